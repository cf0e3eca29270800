"""csrc's test programs under AddressSanitizer and UndefinedBehaviorSanitizer: `pytest -m sanitize`,
some minutes."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from ops.native import build, run

COMPILER = next(
    (
        found
        for name in (os.environ.get("CXX"), "c++", "g++", "clang++")
        if name and (found := shutil.which(name))
    ),
    "",
)


@pytest.fixture(scope="module")
def programs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sanitized(request, tmp_path_factory, "address,undefined")


def sanitized(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    sanitizers: str,
    *targets: str,
) -> Path:
    """The folder with the test programs (or some), built anew where a source changed."""
    if "sanitize" not in request.config.getoption("-m"):
        pytest.skip("takes minutes; ask for it with -m sanitize")
    if not COMPILER:
        pytest.skip("needs a C++17 compiler")
    empty = tmp_path_factory.mktemp("sanitizers") / "empty.cpp"
    empty.write_text("int main() {}\n")
    command = [COMPILER, f"-fsanitize={sanitizers}", empty, "-o", empty.with_suffix("")]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip(f"{COMPILER} has no sanitizers {sanitizers}")
    settings = (
        f"-DCMAKE_CXX_COMPILER={COMPILER}",
        f"-DMOEBIUS_SANITIZERS={sanitizers}",
        # Compiling for the others takes most of an hour, and they could not be run.
        f"-DMOEBIUS_LEVELS={';'.join(levels())}",
    )
    return build(f"sanitized-{sanitizers.replace(',', '-')}", *settings, targets=targets)


def levels() -> list[str]:
    """Those that this processor has, with the emulated one where it can be run."""
    from moebius import _cpu

    found = _cpu.available()
    return [*found, "amx_emulated"] if "avx512bf16" in found else found


@pytest.mark.sanitize
@pytest.mark.timeout(5400)
def test_kernels(programs: Path) -> None:
    """Every instruction set that this processor has passes."""
    from moebius import _cpu

    passed = run(programs / "test_kernels")
    assert set(_cpu.available()) <= {line.removesuffix(": passed") for line in passed.splitlines()}


@pytest.mark.sanitize
@pytest.mark.timeout(5400)
def test_emulated_amx(programs: Path) -> None:
    if not (programs / "test_amx").exists():
        pytest.skip(
            "this compiler or processor has no AVX-512, which the emulated tiles are built on"
        )
    run(programs / "test_amx")


@pytest.mark.sanitize
@pytest.mark.timeout(5400)
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_exchange(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, sanitizers: str
) -> None:
    """ThreadSanitizer sees memory that is read before whoever writes it was waited for."""
    run(sanitized(request, tmp_path_factory, sanitizers, "test_exchange") / "test_exchange")
