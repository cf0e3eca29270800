"""`python -m moebius` is the `moebius` command."""

from moebius.cli.main import script

if __name__ == "__main__":
    script()
