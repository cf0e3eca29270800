"""Without what only Linux or only Unix has, everything imports, and a model generates, on plain PyTorch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Libraries come first, once for all systems: it is moebius that must not miss what is taken away
# then, in a process for each.
TAKE_AWAY = """
import asyncio, ctypes, fcntl, importlib, mmap, os, pkgutil, signal, socket, sys, sysconfig, tempfile
import httpx, jinja2, numpy, pydantic, rich, safetensors.torch, starlette, tokenizers, torch
import typer, uvicorn

sysconfig.get_config_vars()  # read once, by the system's name

for system in sys.argv[3:]:
    child = os.fork()
    if child == 0:
        break
    if os.waitpid(child, 0)[1] != 0:
        sys.exit(f"it does not work on {system}")
else:
    sys.exit()
sys.platform = system
sys.modules["moebius._cpu"] = None
del os.sched_getaffinity, mmap.MADV_HUGEPAGE
if system == "win32":
    del os.sysconf, signal.SIGALRM, mmap.MADV_WILLNEED, mmap.MAP_ANONYMOUS, mmap.MAP_PRIVATE
    for name in ("fcntl", "resource", "uvloop"):
        sys.modules[name] = None

    class Map(mmap.mmap):
        @property
        def madvise(self):
            raise AttributeError("madvise")

    class Kernel32:
        def GetPhysicallyInstalledSystemMemory(self, kibibytes):
            kibibytes._obj.value = 8 * 2**20
            return 1

    def no_directories(path, flags, mode=0o777, opens=os.open):
        if os.path.isdir(path):
            raise PermissionError(path)
        return opens(path, flags, mode)

    def no_readers(descriptor, flush=os.fsync):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError("bad file descriptor")
        flush(descriptor)

    mmap.mmap, os.open, os.fsync = Map, no_directories, no_readers
    ctypes.WinDLL = lambda name: Kernel32()

import moebius
for found in pkgutil.walk_packages(moebius.__path__, "moebius."):
    try:
        if not found.name.endswith("__main__"):
            importlib.import_module(found.name)
    except ModuleNotFoundError as error:  # of the compiled kernels and what wraps them
        if error.name != "moebius._cpu":
            raise
"""
GENERATE = """
from moebius import LLM, SamplingParams
from pathlib import Path

from moebius import machine
from moebius.files import anyone, write_file

file = Path(sys.argv[2], system)
write_file(file, "whole", ours=anyone)
assert file.read_text() == "whole"
if system == "win32":
    assert machine.memory(Path("/nowhere")).limit == 8 * 2**30
assert machine.threads() >= 1
with LLM(sys.argv[1], kv_cache_memory_bytes=2**22) as llm:
    (result,) = llm.generate(["def f("], SamplingParams(max_tokens=4, temperature=0, ignore_eos=True))
assert len(result.outputs[0].token_ids) == 4
print("generated on", system)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process for each system is forked")
def test_it_generates_on_other_systems(tiny_model: Path, tmp_path: Path) -> None:
    code = TAKE_AWAY + GENERATE
    command = [sys.executable, "-W", "ignore", "-c", code, str(tiny_model), str(tmp_path)]
    command += ["darwin", "win32"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["generated on darwin", "generated on win32"]
    assert "Traceback" not in done.stderr, done.stderr
