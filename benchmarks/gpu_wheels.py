"""What benchmarks/gpu.sh needs on a machine that has torch and transformers and no package index.

    python benchmarks/gpu_wheels.py fetch [--python 3.12] [--wheels build/gpu-wheels]     where
    there is an index
    python benchmarks/gpu_wheels.py install [--wheels ...] [--into build/gpu-packages]    over
    there: gpu.sh calls it

`fetch` takes wheels of our dependencies and of pytest, in the versions of constraints.txt, less
torch and transformers and what they always bring along. `install` unpacks those that the Python
there lacks, into a folder for PYTHONPATH. The kernels are not among them: a GPU is served in plain
PyTorch.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
# What these depend on is there too.
THERE = ("torch",)
# Of these, what they depend on differs by version. Charts are not drawn there.
THERE_ALONE = (
    "transformers",
    "numpy",
    "tokenizers",
    "safetensors",
    "huggingface-hub",
    "regex",
    "pyyaml",
    "tqdm",
)
UNUSED = ("matplotlib",)
# Of the development dependencies, what tests/test_device.py and pyproject.toml's pytest settings
# ask for.
TESTS = ("pytest", "pytest-timeout")
# Wheels for this C library (Debian 11's, Ubuntu 20.04's) and for each before it will do.
GLIBC = 31


def closure(names: Iterable[str]) -> set[str]:
    """The packages and all that they depend on, by what is installed here."""
    found: set[str] = set()
    wanted = [canonicalize_name(name) for name in names]
    while wanted:
        name = wanted.pop()
        if name not in found:
            found.add(name)
            needs = [Requirement(text) for text in metadata.requires(name) or ()]
            wanted += [
                canonicalize_name(n.name)
                for n in needs
                if n.marker is None or n.marker.evaluate({"extra": ""})
            ]
    return found


def needed() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ours = {Requirement(text).name for text in project["dependencies"]} - {*UNUSED, *THERE_ALONE}
    return sorted(closure([*ours, *TESTS]) - closure(THERE) - {*THERE_ALONE})


def fetch(wheels: Path, python: str) -> None:
    tags = ("2014", *(f"_2_{minor}" for minor in range(GLIBC, 16, -1)))
    platforms = [f"manylinux{tag}_x86_64" for tag in tags]
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary",
        ":all:",
    ]
    command += ["--implementation", "cp", "--python-version", python, "--dest", str(wheels)]
    command += [f"--platform={platform}" for platform in platforms]
    command += ["--constraint", str(ROOT / "constraints.txt"), *needed()]
    subprocess.run(command, check=True)
    found = sorted(wheels.glob("*.whl"))
    for wheel in found:
        print(f"{wheel.stat().st_size:12,}  {wheel.name}")
    print(
        f"{sum(wheel.stat().st_size for wheel in found):12,}  bytes in {len(found)} wheels in "
        f"{wheels}"
    )


def is_here(wheel: Path) -> bool:
    """Whether some version of the wheel's package is installed."""
    try:
        metadata.version(wheel.name.partition("-")[0])
    except metadata.PackageNotFoundError:
        return False
    return True


def install(wheels: Path, into: Path) -> None:
    lacking = [str(wheel) for wheel in sorted(wheels.glob("*.whl")) if not is_here(wheel)]
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--upgrade",
    ]
    if lacking:
        subprocess.run([*command, "--target", str(into), *lacking], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("fetch", "install"))
    parser.add_argument("--python", default="3.12", help="the other machine's")
    parser.add_argument("--wheels", type=Path, default=ROOT / "build" / "gpu-wheels")
    parser.add_argument("--into", type=Path, default=ROOT / "build" / "gpu-packages")
    given = parser.parse_args()
    if given.action == "fetch":
        fetch(given.wheels, given.python)
    else:
        install(given.wheels, given.into)


if __name__ == "__main__":
    main()
