"""`python -m moebius` is the `moebius` command."""

from moebius.cli.main import main

if __name__ == "__main__":
    main()
