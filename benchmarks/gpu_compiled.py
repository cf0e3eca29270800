"""What a card's compiler says of our kernels, without a card: registers, bytes of stack that a
thread spills to, shared memory, and the instructions of the loop that a product goes through.

    python benchmarks/gpu_compiled.py [--capability 90] [--only WORDS] [--json FILE]

Kernels are those of the stage `operations` of benchmarks/gpu.sh, in the sizes of published models
(gpu_operations.py), which run nowhere here: Triton's own ptxas compiles them. A step of a product
is one turn of its loop: `step_instructions` a warp, of which `step_products` are for the matrix
units. A warp issues one instruction a cycle at most, and four warps at a time do: a step of four
warps takes as many cycles as that, unless memory takes longer, which brings some 14 bytes a cycle
to each of an H100's processors, and 20 to an H200's. Recurrences, whose plans are counted on the
host, are left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / part) for part in ("src", "benchmarks", "benchmarks/peers", "tests")]

PROCESSORS = {80: 108, 90: 132}
"""Of an A100, and of an H100 or H200."""
PRODUCTS = ("HGMMA", "HMMA")
_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);")
_LABEL = re.compile(r"(\.L_x_\d+):")
_JUMP = re.compile(r"BRA.*`\((\.L_x_\d+)\)")


def launched(capability: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each kernel once, with the first operation that launches it."""
    os.environ["TRITON_INTERPRET"] = "1"
    from unittest import mock

    import torch

    import gpu_operations
    from gpu_cases import Inputs
    from gpu_kernels.compiling import launches
    from moebius.ops.triton import TritonOps, tiles

    class Ops(TritonOps):
        many_rows = tiles.ManyRows.WHERE_ENOUGH

        def looks(self) -> bool:
            return False

    card = {
        "_capability": lambda _: divmod(capability, 10),
        "processors": lambda _: PROCESSORS[capability],
    }
    known = []
    with mock.patch.multiple(tiles, **card), torch.inference_mode():
        for case in gpu_operations.cases(Inputs(Ops(), "meta", False)):
            with launches() as seen:
                try:
                    case.make().calls[0]()
                except (NotImplementedError, RuntimeError, AttributeError) as error:
                    # What counts on the host counts nothing on meta.
                    print(f"{case.name}: not launched: {error}"[:110], file=sys.stderr)
            for each in seen:
                if each not in known:
                    known.append(each)
                    yield case.name, dataclasses.asdict(each)


def compile_all(capability: int) -> None:
    """Kernels of standard input, a line of JSON each on standard output."""
    import triton

    from gpu_kernels.compiling import Launch, compiled

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    for case, launch in json.load(sys.stdin):
        made = compiled(Launch(**launch), capability)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(made.asm["cubin"])
            file.flush()
            used = _said(tools / "cuobjdump", "--dump-resource-usage", file.name)
            code = _said(tools / "nvdisasm", "-c", file.name)
        registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", used).groups())  # type: ignore[union-attr]
        constants = launch["constants"]
        tile = [constants[each] for each in ("M", "N", "KEYS", "K") if each in constants]
        found = {
            "operation": case,
            "kernel": launch["name"],
            "tile": tile,
            "warps": launch["options"].get("num_warps", 4),
            "registers": registers,
            "stack_bytes": stack,
            "shared_bytes": made.metadata.shared,
            **step_of(code),
        }
        print(json.dumps(found), flush=True)


def _said(*command: object) -> str:
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=True
    ).stdout


def step_of(code: str) -> dict[str, int]:
    """Of the loop with the most products; nothing where there is none."""
    instructions: list[str] = []
    places: dict[str, int] = {}
    best: dict[str, int] = {}
    for line in code.splitlines():
        label = _LABEL.match(line.strip())
        if label:
            places[label[1]] = len(instructions)
        found = _INSTRUCTION.match(line)
        if not found:
            continue
        instructions.append(found[1])
        jump = _JUMP.search(found[1])
        if jump and jump[1] in places:
            step = instructions[places[jump[1]] :]
            products = sum(any(each in one for each in PRODUCTS) for one in step)
            if products > best.get("step_products", 0):
                best = {"step_instructions": len(step), "step_products": products}
    return best


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--capability", type=int, choices=PROCESSORS, default=90)
    parser.add_argument("--only", default="", help="operations with these words in their names")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--compile", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.compile:
        compile_all(given.capability)
        return
    wanted = [each for each in launched(given.capability) if given.only in each[0]]
    from gpu_kernels.compiling import compiler_environment

    command = [sys.executable, __file__, "--compile", "--capability", str(given.capability)]
    rows = []
    with (
        tempfile.TemporaryDirectory() as cache,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=compiler_environment() | {"TRITON_CACHE_DIR": cache},
        ) as process,
    ):
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(wanted))
        process.stdin.close()
        for line in process.stdout:
            rows.append(json.loads(line))
            show(rows[-1])
    if process.returncode:
        sys.exit(f"compiling failed behind {len(rows)} of {len(wanted)} kernels")
    if given.json:
        import triton

        about = {"capability": given.capability, "triton": triton.__version__, "kernels": rows}
        given.json.write_text(json.dumps(about, indent=1) + "\n")


def show(row: dict[str, Any]) -> None:
    tile = " x ".join(map(str, row["tile"]))
    step = f"{row['step_instructions']:5} a step" if "step_products" in row else ""
    print(
        f"{row['operation']:58.58} {row['kernel']:16} {tile:15} {row['warps']:2} warps "
        f"{row['registers']:4} registers {row['stack_bytes']:5} B of stack "
        f"{row['shared_bytes'] // 1024:4} KiB {step}",
        flush=True,
    )


if __name__ == "__main__":
    main()
