"""csrc's test program on an emulated 64-bit ARM processor: `pytest -m aarch64`, some two minutes.

Debian and Ubuntu: apt install g++-aarch64-linux-gnu qemu-user-static cmake.
"""

from __future__ import annotations

import shutil
import sysconfig

import pytest

from ops.native import build, run

COMPILER = "aarch64-linux-gnu-g++"
EMULATORS = ("qemu-aarch64-static", "qemu-aarch64")
CROSS = (
    "-DCMAKE_SYSTEM_NAME=Linux",
    "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
    f"-DCMAKE_CXX_COMPILER={COMPILER}",
    # Then the emulator needs no libraries of the other system.
    "-DCMAKE_EXE_LINKER_FLAGS=-static",
    "-DMOEBIUS_SANITIZE=OFF",
)


@pytest.mark.aarch64
@pytest.mark.timeout(5400)
def test_kernels(request: pytest.FixtureRequest) -> None:
    """The portable kernels and those for NEON pass, subnormal numbers flushed on every thread."""
    if "aarch64" not in request.config.getoption("-m"):
        pytest.skip("takes minutes; ask for it with -m aarch64")
    emulator = next((found for name in EMULATORS if (found := shutil.which(name))), None)
    missing = [COMPILER] * (shutil.which(COMPILER) is None) + [EMULATORS[0]] * (emulator is None)
    if missing or emulator is None:
        pytest.skip(f"needs {' and '.join(missing)}; this is {sysconfig.get_platform()}")
    program = build("aarch64", *CROSS) / "test_kernels"
    assert run(emulator, program).splitlines() == ["portable: passed", "neon: passed"]
