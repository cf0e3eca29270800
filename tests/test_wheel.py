"""The wheel and the source archive, built and installed as a stranger would: `pytest -m wheel`, some five minutes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import threading
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# torch's own wheels ask for this glibc.
OLDEST_GLIBC = (2, 28)
pytestmark = [pytest.mark.wheel, pytest.mark.timeout(1800)]


def run(*command: str | Path, path: Path | None = None, seconds: float = 1200) -> str:
    """Its standard output. With `path`, programs are found in that folder alone. Fails with all it said."""
    environment = {"HOME": os.environ.get("HOME", "/"), "PATH": str(path or os.environ["PATH"])}
    kept = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(("PIP_", "HTTP", "http", "SSL"))
    }
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=seconds,
        cwd=ROOT,
        env={**kept, **environment},
    )
    assert done.returncode == 0, (
        f"{command[0]} returned {done.returncode}:\n{done.stdout}\n{done.stderr}"
    )
    return done.stdout


@pytest.fixture(scope="module")
def built(request: pytest.FixtureRequest) -> Path:
    """dist/, with what `make wheel` made for this Python."""
    if "wheel" not in request.config.getoption("-m"):
        pytest.skip("takes minutes; ask for it with -m wheel")
    if sys.platform != "linux" or not shutil.which("c++"):
        pytest.skip("manylinux wheels are built on Linux with a C++17 compiler")
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    base = Path(sysconfig.get_config_var("BINDIR")) / f"python3.{sys.version_info.minor}"
    run("make", "wheel", f"PYTHON={base}")
    return ROOT / "dist"


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (found,) = built.glob("moebius-*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a new environment with the wheel and what it depends on, installed out of reach of a compiler."""
    environment = tmp_path_factory.mktemp("wheel") / "venv"
    run(sys.executable, "-m", "venv", environment)
    programs = environment / "bin"
    for name in ("cc", "c++", "g++", "gcc", "clang", "cmake", "ninja"):
        assert shutil.which(name, path=str(programs)) is None
    pip = (programs / "python", "-m", "pip", "install", "--quiet", "--only-binary", ":all:")
    constraints = ("--constraint", ROOT / "constraints.txt")
    run(*pip, *constraints, "torch", path=programs)
    run(*pip, *constraints, wheel, path=programs)
    return programs


def test_the_tag_promises_no_newer_system_than_torchs(wheel: Path) -> None:
    shown = run(ROOT / "build" / "wheel-tools" / "bin" / "auditwheel", "show", wheel)
    (major, minor) = re.search(r'manylinux_(\d+)_(\d+)_\w+"', " ".join(shown.split())).groups()
    assert (int(major), int(minor)) <= OLDEST_GLIBC
    assert f"manylinux_{major}_{minor}_" in wheel.name


def test_the_wheel_holds_one_set_of_kernels_and_the_bundled_model(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    kernels = [name for name in names if name.endswith(".so")]
    assert kernels == [f"moebius/_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"]
    bundled = {path.name for path in (ROOT / "src" / "moebius" / "bundled").iterdir()}
    assert {f"moebius/bundled/{name}" for name in bundled} <= set(names)


def test_the_source_archive_is_the_repository(built: Path) -> None:
    """All files under version control, and none beside them but pip's description."""
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT)
    if tracked.returncode:
        pytest.skip("not a clone")
    (found,) = built.glob("moebius-*.tar.gz")
    with tarfile.open(found) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    here = {name for name in tracked.stdout.splitlines() if (ROOT / name).is_file()}
    assert here <= names
    untracked = run("git", "ls-files", "--others", "--exclude-standard").splitlines()
    assert names - here <= {"PKG-INFO", *untracked}


def test_errors_of_the_kernels_arrive(installed: Path) -> None:
    """How C++ holds on to an exception is partly replaced in this build: a thousand are held and let go."""
    code = """
from moebius import _cpu

caught = 0
for _ in range(1000):
    try:
        _cpu.Ops("sse9", 1)
    except ValueError as error:
        caught += str(error) == "unknown instruction set sse9"
print(caught)
"""
    assert run(installed / "python", "-c", code, path=installed).split() == ["1000"]


def test_it_generates_from_the_bundled_model(installed: Path) -> None:
    asked = ("generate", "import os\n\ndef", "--temperature", "0", "--max-tokens", "8")
    first = run(installed / "moebius", *asked, path=installed)
    assert first.strip()
    assert run(installed / "moebius", *asked, path=installed) == first


@pytest.fixture(scope="module")
def served(installed: Path) -> Iterator[str]:
    """The address of `moebius serve bundled`."""
    command = (installed / "moebius", "serve", "bundled", "--port", "0", "--host", "127.0.0.1")
    environment = {"PATH": str(installed), "HOME": os.environ.get("HOME", "/")}
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, cwd=installed, env=environment
    ) as server:
        stop = threading.Timer(120, server.kill)
        stop.start()
        lines = []
        assert server.stderr is not None
        for line in server.stderr:
            lines.append(line)
            if found := re.search(r"serving on (http://\S+)/v1", line):
                yield found[1]
                break
        else:
            pytest.fail("the server ended:\n" + "".join(lines))
        stop.cancel()
        server.terminate()
        server.communicate(timeout=30)


def test_the_compiled_kernels_serve(installed: Path, served: str) -> None:
    """The fingerprint of an answer names the best instruction set of this processor."""
    body = {"model": "bundled", "prompt": "class Stack:", "max_tokens": 8, "temperature": 0}
    request = urllib.request.Request(
        f"{served}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        answer = json.load(response)
    assert answer["usage"]["completion_tokens"] == 8
    best = run(
        installed / "python",
        "-c",
        "from moebius import _cpu; print(_cpu.available()[-1])",
        path=installed,
    ).strip()
    assert best in re.split("[_-]", answer["system_fingerprint"])
