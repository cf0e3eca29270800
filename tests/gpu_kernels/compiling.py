"""Compiles kernels for GPUs, none of which has to be there: the interpreter takes what the compiler
does not.

    with launches() as seen:          # nothing runs, so sizes may be those of real models
        OPS.rms_norm(torch.empty(2, 4096, dtype=torch.bfloat16), weight, 1e-6)
    assert_compile(seen, kernels)     # a module of kernels, all of which were launched

The compiler works in another process: functions that were made for the interpreter are not its.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import triton
from triton.runtime.interpreter import InterpretedFunction

# The most shared memory that a block of threads may have, by compute capability (CUDA C++
# Programming Guide, "Technical Specifications per Compute Capability").
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
# Of these it is looked at how much of their registers they spill.
SPILLS_OF = 90
_OPTIONS = ("num_warps", "num_stages")
_DTYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint32: "u32",
    torch.uint8: "u8",
    torch.bool: "i1",
}


@dataclasses.dataclass
class Launch:
    """A kernel with arguments of these types: what Triton would compile anew.

    signature   of each argument its type, as the compiler spells them
    constants   values of those that are compiled in
    aligned     names of pointers and numbers that are multiples of 16
    options     num_warps and so on
    """

    module: str
    name: str
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: list[str]
    options: dict[str, int]


@contextmanager
def launches() -> Iterator[list[Launch]]:
    """What is launched within the context, none of which runs: results hold anything."""
    seen: list[Launch] = []

    def note(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        each = _launch(self, args, kwargs)
        if each not in seen:
            seen.append(each)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpretedFunction, "run", note)
        yield seen


def _launch(kernel: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Launch:
    options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
    function = inspect.signature(kernel.fn)
    bound = function.bind(*args, **kwargs)
    bound.apply_defaults()
    launch = Launch(kernel.fn.__module__, kernel.fn.__name__, {}, {}, [], options)
    for name, value in bound.arguments.items():
        compiled_in = "constexpr" in str(function.parameters[name].annotation)
        # As at a launch: None and 1 are compiled in too.
        if compiled_in or value is None or (type(value) is int and value == 1):
            launch.signature[name] = "constexpr"
            launch.constants[name] = _plain(value)
            continue
        launch.signature[name], aligned = _type(value)
        if aligned:
            launch.aligned.append(name)
    return launch


def _plain(value: Any) -> Any:
    """A constant as JSON can hold it."""
    value = getattr(value, "value", value)
    return {"dtype": str(value)} if isinstance(value, triton.language.dtype) else value


def _type(value: Any) -> tuple[str, bool]:
    """How the compiler spells the type of an argument, and whether it is a multiple of 16."""
    if isinstance(value, torch.Tensor):
        begin = value.storage_offset() * value.element_size()
        return f"*{_DTYPES[value.dtype]}", begin % 16 == 0
    if isinstance(value, bool):
        return "i1", False
    if isinstance(value, int):
        return ("i32" if -(2**31) <= value < 2**31 else "i64"), value % 16 == 0
    assert isinstance(value, float), f"{value!r} is nothing that a kernel takes"
    return "fp32", False


def assert_compile(
    seen: Sequence[Launch], *modules: ModuleType, most_spilled: int | None = None
) -> None:
    """All of `seen` compile for all of SHARED_BYTES and fit there; and no kernel of `modules` that
    others may launch is missing. most_spilled: bytes of a thread's registers that a kernel may keep
    in memory."""
    named = {(each.module, each.name) for each in seen}
    every = {
        (module.__name__, name)
        for module in modules
        for name, found in vars(module).items()
        if isinstance(found, InterpretedFunction)
        if found.fn.__module__ == module.__name__ and not name.startswith("_")
    }
    assert every <= named, f"not launched: {sorted(every - named)}"
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, Path(__file__)],
            input=json.dumps([most_spilled, *map(dataclasses.asdict, seen)]),
            env=_environment() | {"TRITON_CACHE_DIR": cache},
            capture_output=True,
            text=True,
            timeout=580,
        )
    assert done.returncode == 0, done.stdout + done.stderr


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return kept | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def _compile(launch: Launch, capability: int, most_spilled: int | None) -> str | None:
    """Says what is wrong, in the process without the interpreter."""
    import importlib

    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    kernel = getattr(importlib.import_module(launch.module), launch.name)
    source = ASTSource(
        fn=kernel,
        signature=launch.signature,
        constexprs={name: _constant(value) for name, value in launch.constants.items()},
        attrs={
            (kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in launch.aligned
        },
    )
    try:
        made = compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)
    except Exception as wrong:
        return f"{type(wrong).__name__}: {wrong}"
    if made.metadata.shared > SHARED_BYTES[capability]:
        return f"{made.metadata.shared} bytes of shared memory"
    if most_spilled is not None and capability == SPILLS_OF:
        spilled = _spilled(made.asm["ptx"])
        if spilled > most_spilled:
            return f"{spilled} bytes of registers are spilled"
    return None


def _spilled(ptx: str) -> int:
    """Bytes that a thread stores, as the assembler that comes with Triton tells."""
    assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "kernel.ptx"
        source.write_text(ptx)
        command = [assembler, "-v", f"--gpu-name=sm_{SPILLS_OF}a", source, "-o", os.devnull]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return sum(map(int, re.findall(r"(\d+) bytes spill stores", told)))


def _constant(value: Any) -> Any:
    if isinstance(value, dict):
        return triton.language.dtype(value["dtype"])
    return value


def _main() -> int:
    failed = 0
    most_spilled, *every = json.load(sys.stdin)
    for each in every:
        for capability in SHARED_BYTES:
            wrong = _compile(Launch(**each), capability, most_spilled)
            if wrong is not None:
                failed += 1
                print(f"{each['name']} on sm_{capability}, {each['constants']}: {wrong}\n")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(_main())
