"""One stage of benchmarks/gpu.sh: measure on a device and leave a record, OUT/STAGE.json, that is
valid at any moment.

    python benchmarks/gpu.py STAGE --out OUT [--device cuda|cpu] [--small]

    environment   what the machine is, its memory bandwidth and its matrix peak
    tests         tests/test_device.py on the device, and one rank over NCCL
    kernels       tests/gpu_kernels on it, each kernel beside plain PyTorch; without a GPU in
                  Triton's interpreter
    tiles         a linear layer with each of some sizes of tiles, for the table in
                  moebius.ops.triton.tiles
    checkpoint    the model's random weights, written to the folder of temporary files
    proof         what the engine proves of its kernels at start: cold, and with all compiled
    graphs        tokens after a prompt of 128, of one request and of 32, with CUDA graphs and
                  without, with steps that begin ahead and without, and the host's time for a step;
                  and with half of the experts in the host's memory, where graphs are in pieces
    one_answer    promise P1: tokens and log-probabilities alone, in batches, in chunks, after
                  preemptions, with graphs and without, compared by their bits

The model is M2 of benchmarks/peers (random bfloat16 weights), computed by whatever a start selects.
--small takes a model of some kilobytes and few tokens: a rehearsal, whose figures mean nothing.
Without a GPU plain PyTorch computes, and the proof is made in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks" / "peers")]

from sizes import MADE, Sizes  # noqa: E402

SMALL = Sizes(
    layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, experts=4, top_k=2, width=32, vocab=4096
)
# Ids below are byte tokens and specials.
FIRST_ID = 300
NO_CUDA = (
    "torch finds no CUDA device; a rehearsal without one: benchmarks/gpu.sh --device cpu --small"
)

NO_TORCH = "has no torch; name a Python that has: PYTHON=PROGRAM benchmarks/gpu.sh"


@dataclass(slots=True)
class Stage:
    """What a stage is to do, and its record, which is on the disk after every `keep`."""

    name: str
    out: Path
    device: str
    small: bool
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def sizes(self) -> Sizes:
        return SMALL if self.small else MADE["m2"]

    @property
    def checkpoint(self) -> Path:
        return Path(tempfile.gettempdir()) / "moebius-gpu" / ("small" if self.small else "m2")

    def keep(self, **values: Any) -> None:
        self.record |= values
        partial = self.out / f"{self.name}.partial"
        partial.write_text(json.dumps(self.record, indent=1) + "\n")
        partial.replace(self.out / f"{self.name}.json")


def seconds(work: Callable[[], object], device: str) -> float:
    """How long a call takes, to the end of what it asked of the device."""
    import torch

    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def environment(stage: Stage) -> None:
    import torch

    stage.keep(python=platform.python_version(), torch=torch.__version__, processors=os.cpu_count())
    if stage.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        stage.keep(
            card=properties.name,
            memory_bytes=properties.total_memory,
            capability=list(torch.cuda.get_device_capability(0)),
            cuda=torch.version.cuda,
            without_kernels=why_no_kernels(torch.device("cuda")),
        )
    size = 2**22 if stage.small else 2**32
    side = 256 if stage.small else 8192
    source = torch.zeros(size, dtype=torch.uint8, device=stage.device)
    target = torch.empty_like(source)
    a_MK = torch.randn(side, side, device=stage.device).bfloat16()
    copies = [seconds(lambda: target.copy_(source), stage.device) for _ in range(6)]
    products = [seconds(lambda: a_MK @ a_MK, stage.device) for _ in range(6)]
    # The first of each is the warm-up. A copy reads and writes every byte.
    stage.keep(
        bytes_per_second=2 * size / min(copies[1:]),
        flops_per_second=2 * side**3 / min(products[1:]),
    )


def why_no_kernels(device: Any) -> str:
    """Why none of ours can be launched on this machine, in a line; empty where they can. Triton
    builds what launches them with the machine's C compiler, for which Python's headers have to be
    there."""
    from moebius.ops.triton_usable import why_not

    reason = why_not(device)
    if reason:
        return reason
    from triton.runtime import driver

    try:
        driver.active.get_current_device()
    except Exception as error:  # of several kinds
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return ""


def tests(stage: Stage) -> None:
    run_tests(stage, "tests/test_device.py", "tests/parallel/test_nccl.py")


def kernels(stage: Stage) -> None:
    # In the interpreter all of them take minutes.
    run_tests(stage, "tests/gpu_kernels" + ("/test_pointwise.py" if stage.small else ""))


def tiles(stage: Stage) -> None:
    """Seconds of a layer of one row, of a batch's and of a prompt's, by tile."""
    if stage.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    from moebius.ops.triton import TritonOps, linear
    from moebius.ops.triton.tiles import Tile, Tiles, tiles_for

    size = 64 if stage.small else 4096
    rows = (1, 3) if stage.small else (1, 16, 512, 4096)
    ops = TritonOps()
    weight = torch.randn(4 * size, size, device=stage.device).bfloat16()
    linear.FEW_TILES = 0  # whose sums are not split
    ours = tiles_for(weight.device)
    wanted = [ours.few, ours.many, Tile(64, 128, 64, 4, 4), Tile(64, 256, 64, 4, 4)]
    wanted += [Tile(128, columns, 64, 8, stages) for columns in (128, 256) for stages in (3, 4)]
    wanted += [Tile(256, 128, 64, 8, 3), Tile(128, 128, 64, 4, 4), Tile(64, 64, 128, 4, 3)]
    found: list[dict[str, Any]] = []
    for tile in wanted[:2] if stage.small else dict.fromkeys(wanted):
        linear.tiles_for = lambda _, tile=tile: Tiles(tile, tile, tile.columns)
        of_tile: dict[str, Any] = {"tile": tile._asdict(), "in_use": tile in ours}
        found.append(of_tile)
        layers = ops.prepare_linear((weight, None))
        for count in rows:
            x_TI = torch.randn(count, size, device=stage.device).bfloat16()
            try:
                walls = [seconds(partial(ops.linear, x_TI, layers), stage.device) for _ in range(6)]
            except Exception as error:  # more than this card has
                of_tile[f"rows_{count}"] = type(error).__name__
                continue
            of_tile[f"rows_{count}"] = statistics.median(walls[1:])
        stage.keep(shape=list(weight.shape), tiles=found)


def run_tests(stage: Stage, *where: str) -> None:
    log = stage.out / f"{stage.name}.log"
    results = Path(tempfile.gettempdir()) / f"moebius-gpu-{stage.name}.xml"
    command = [sys.executable, "-m", "pytest", *where, f"--junit-xml={results}"]
    # A file that cannot be imported there costs no other's tests.
    command.append("--continue-on-collection-errors")
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "MOEBIUS_TEST_DEVICE": stage.device, "PYTHONPATH": path}
    with log.open("w") as file:
        done = subprocess.run(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=environment
        )
    suite = ElementTree.parse(results).getroot().find("testsuite")
    assert suite is not None
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    stage.keep(returned=done.returncode, **counts)
    if done.returncode:
        sys.exit(f"tests failed; see {log}")


def checkpoint(stage: Stage) -> None:
    """Random weights take a minute to draw: a folder that is whole is taken as it is."""
    import shutil

    from make_checkpoint import config, write_weights

    if not (stage.checkpoint / "config.json").exists():
        stage.checkpoint.mkdir(parents=True, exist_ok=True)
        write_weights(stage.sizes, stage.checkpoint, seed=0)
        # Prompts are token ids: any tokenizer will do.
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(ROOT / "src" / "moebius" / "bundled" / name, stage.checkpoint)
        (stage.checkpoint / "config.json").write_text(json.dumps(config(stage.sizes)))
    stage.keep(parameters=stage.sizes.parameters)


def proof(stage: Stage) -> None:
    import torch

    if stage.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    from moebius.engine.proof import ProofSizes, prove
    from moebius.models.encoder_decoder import decoder_of
    from moebius.models.store import open_checkpoint
    from moebius.models.store.load import Loader
    from moebius.ops.triton.captured import CapturedOps

    require_checkpoint(stage)
    found = open_checkpoint(stage.checkpoint)
    device = torch.device(stage.device)
    # The interpreter takes a minute for what a card does in some seconds.
    sizes = ProofSizes(long=2, step=2, sequences=1) if stage.small else ProofSizes()
    for turn in ("cold",) if stage.small else ("cold", "warm"):
        ops = CapturedOps()
        decoder = decoder_of(found.config, ops, torch.bfloat16, device="meta")
        sources = found.sources_at(None)
        weights = found.plan_weights("bfloat16", device.type, ops.formats(torch.bfloat16), sources)
        made = prove(decoder, Loader(found, device), weights, 16, sizes=sizes)
        stage.keep(
            **{f"{turn}_s": made.seconds},
            operations=sorted(made.operations),
            failed={each.value: reason for each, reason in made.failed.items()},
            reason=made.reason,
            holds=made.holds,
        )


def require_checkpoint(stage: Stage) -> None:
    if not (stage.checkpoint / "config.json").exists():
        sys.exit(f"there are no weights in {stage.checkpoint}; run the stage checkpoint first")


def load(stage: Stage, **options: Any) -> Any:
    """The model on the device."""
    if stage.device == "cpu":
        os.environ["MOEBIUS_CPU_ISA"] = "reference"
    from moebius import LLM, __version__

    require_checkpoint(stage)
    start = time.perf_counter()
    usual = {
        "max_model_len": 2304,
        "max_num_seqs": 32,
        "kv_cache_memory_bytes": 2**26 if stage.small else 2**32,
        "enable_prefix_caching": False,
    }
    llm = LLM(str(stage.checkpoint), device=stage.device, dtype="bfloat16", **(usual | options))
    stage.keep(moebius=__version__, load_s=time.perf_counter() - start)
    return llm


def generate(
    stage: Stage, llm: Any, *, requests: int, prompt: int, output: int, seed: str
) -> float:
    """Seconds for so many requests at once, of so many tokens in and out, exactly."""
    from moebius import SamplingParams

    ids = random.Random(seed)
    prompts = [
        [ids.randrange(FIRST_ID, stage.sizes.vocab) for _ in range(prompt)] for _ in range(requests)
    ]
    params = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)
    start = time.perf_counter()
    results = llm.generate(prompts, params, progress=False)
    wall = time.perf_counter() - start
    made = [len(result.outputs[0].token_ids) for result in results]
    assert made == [output] * requests, made
    return wall


@contextmanager
def without_graphs() -> Iterator[None]:
    """Within it no step is captured."""
    from moebius.ops.triton import captured

    with mock.patch.object(captured, "captured_rows", lambda *_: []):
        yield


@contextmanager
def without_steps_ahead() -> Iterator[None]:
    """Within it no step begins before the host has read the tokens of the one before."""
    from moebius.engine import load as loading
    from moebius.engine.steps_ahead import NO_STEPS_AHEAD

    with mock.patch.object(loading, "steps_ahead", lambda *args: NO_STEPS_AHEAD):
        yield


@contextmanager
def timed_steps() -> Iterator[list[float]]:
    """Seconds that the host needs for a step until all of it is launched."""
    from moebius.engine.runner import Runner

    found: list[float] = []
    execute = Runner.execute

    def timed(self: Any, inputs: Any) -> Any:
        start = time.perf_counter()
        out = execute(self, inputs)
        found.append(time.perf_counter() - start)
        return out

    with mock.patch.object(Runner, "execute", timed):
        yield found


def graphs(stage: Stage) -> None:
    ways: tuple[tuple[str, Any], ...] = (
        ("with_graphs", nullcontext),
        ("without_graphs", without_graphs),
    )
    for name, way in (*ways, ("without_steps_ahead", without_steps_ahead)):
        steps_of(stage, name, way, 64)
    if stage.device == "cuda":  # a model that is on a CPU anyway has none in pieces
        for name, way in ways:
            steps_of(stage, f"in_pieces_{name}", way, 16, experts=stage.sizes.experts // 2)


def steps_of(stage: Stage, name: str, way: Any, output: int, **options: Any) -> None:
    """Tokens a second, and the host's time for a step."""
    prompt = 8 if stage.small else 128
    output = 4 if stage.small else output
    with way(), timed_steps() as steps, load(stage, **options) as llm:
        for requests in (1, 4 if stage.small else 32):
            shape = {"requests": requests, "prompt": prompt, "seed": f"graphs-{requests}"}
            generate(stage, llm, output=2, **shape)
            first = generate(stage, llm, output=1, **shape)
            steps.clear()
            whole = generate(stage, llm, output=output, **shape)
            rate = requests * (output - 1) / max(whole - first, 1e-9)
            found = {"tokens_per_second": rate, "host_s_a_step": statistics.median(steps)}
            stage.keep(**{f"{name}_requests_{requests}": found})


def one_answer(stage: Stage) -> None:
    """The same requests in other company each time; floats are compared as they are."""
    few = {"max_num_batched_tokens": 64, "max_num_seqs": 8}
    ways: dict[str, tuple[Any, dict[str, Any]]] = {
        "together": (nullcontext, {}),
        "in chunks": (nullcontext, few),
        "preempted": (nullcontext, few | {"kv_cache_tokens": 512}),
        "without graphs": (without_graphs, {}),
    }
    with load(stage) as llm:
        wanted = [answers(llm, [each])[0] for each in range(8)]
        # What asks for log-probabilities waits for the host, and what does not begins ahead.
        ahead = answers(llm, range(8), logprobs=None)
    tokens_differ = sum(one[0] != other[0] for one, other in zip(ahead, wanted, strict=True))
    stage.keep(**{"steps ahead": {"requests": len(wanted), "differ": tokens_differ}})
    for name, (way, options) in ways.items():
        options = options.copy()
        tokens = options.pop("kv_cache_tokens", None)
        if tokens:
            options |= {"kv_cache_memory_bytes": tokens * cached_bytes(stage), "max_model_len": 320}
        with way(), load(stage, **options) as llm:
            found = answers(llm, range(8))
        differ = sum(one != other for one, other in zip(found, wanted, strict=True))
        stage.keep(**{name: {"requests": len(wanted), "differ": differ}})


def cached_bytes(stage: Stage) -> int:
    """What a token takes of the cache, in bfloat16."""
    sizes = stage.sizes
    return 2 * 2 * sizes.layers * sizes.kv_heads * sizes.head_dim


def answers(llm: Any, requests: Sequence[int], logprobs: int | None = 2) -> list[Any]:
    """Tokens and log-probabilities of greedy requests and of drawn ones."""
    from moebius import SamplingParams

    prompts = []
    params = []
    for each in requests:
        ids = random.Random(f"answer-{each}")
        prompts.append([ids.randrange(FIRST_ID, 4096) for _ in range(5 + 31 * each)])
        heat = float(each % 2)
        params.append(
            SamplingParams(
                temperature=heat,
                top_k=20 * (each % 4 == 3),
                seed=each,
                max_tokens=24,
                logprobs=logprobs,
                ignore_eos=True,
            )
        )
    outputs = [each.outputs[0] for each in llm.generate(prompts, params, progress=False)]
    return [(list(each.token_ids), each.logprobs) for each in outputs]


STAGES = {
    stage.__name__: stage
    for stage in (
        environment,
        tests,
        kernels,
        tiles,
        checkpoint,
        proof,
        graphs,
        one_answer,
    )
}


def prepared(parser: argparse.ArgumentParser, stages: Iterable[str]) -> Stage:
    """What the command line asks for; exit status 2 where this machine cannot do it."""
    parser.add_argument("stage", choices=stages)
    parser.add_argument("--out", type=Path, required=True, help="folder of the records")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args()
    try:
        import torch
    except ImportError:
        print(f"{sys.executable} {NO_TORCH}", file=sys.stderr)
        sys.exit(2)
    if given.device == "cuda" and not torch.cuda.is_available():
        print(NO_CUDA, file=sys.stderr)
        sys.exit(2)
    given.out.mkdir(parents=True, exist_ok=True)
    return Stage(given.stage, given.out, given.device, given.small)


def run(stage: Stage, work: Callable[[], None]) -> None:
    """With a record that says how far it came, whatever ends it."""
    import torch

    stage.keep(stage=stage.name, device=stage.device, small=stage.small, finished=False)
    start = time.perf_counter()
    work()
    peak = torch.cuda.max_memory_allocated() if stage.device == "cuda" else None
    stage.keep(finished=True, stage_s=time.perf_counter() - start, peak_device_bytes=peak)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    stage = prepared(parser, STAGES)
    run(stage, lambda: STAGES[stage.name](stage))


if __name__ == "__main__":
    main()
