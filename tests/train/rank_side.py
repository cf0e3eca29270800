"""Ranks that train together, as processes of their own: forked here, where all is imported once.

What is measured goes into files of a folder, for the tests to compare with one process.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import moebius
from moebius.cli.main import main
from moebius.errors import NumericalError
from moebius.moe.config import FeedForwardConfig
from moebius.moe.dispatch import Dispatcher, LocalDispatcher
from moebius.moe.experts import Experts
from moebius.moe.placement import Placement
from moebius.moe.router import Routing
from moebius.nn.spec import Place
from moebius.ops.config import RouterConfig
from moebius.train import start as begin
from moebius.train.data import prepare
from moebius.train.expert_parallel import RowsHere, TrainingDispatcher
from moebius.train.ops import TrainingOps
from moebius.train.ranks import Ranks
from moebius.train.recipe import read_recipe
from moebius.train.trainer import Trainer

SECONDS = 120.0
_PATCH = pytest.MonkeyPatch()
"""Of products in Triton's interpreter, which nothing else here asks for."""
STEPS = {"capacity": 8, "bias": 10, "tuned": 2}
"""The recipes, by the names of their files, and how many steps of each are compared."""
HOPS = 3
"""Steps between two checkpoints of the run that goes on with another number of ranks."""

EXPERTS = 7
TOP_K = 3
SIZE = 16
"""Of hidden states; experts are twice as wide: as many numbers as torch takes at a time, wherever
it computes. Of fewer it computes the last ones of all rows by other instructions."""
TOKENS = 24


def start(count: int, act: Callable[[int], Any]) -> list[int]:
    """Processes of a group; each ends with what `act` exits with, 1 for another error."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    started = []
    for rank in range(count):
        pid = os.fork()
        if pid == 0:
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(count),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            _act(act, rank)
        started.append(pid)
    return started


def _act(act: Callable[[int], Any], rank: int) -> None:
    code = 1
    # torch makes its pool of threads anew in a forked process, at its first use: where two threads
    # come to that at once, one of them finds none.
    torch.set_num_threads(torch.get_num_threads())
    try:
        act(rank)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(started: list[int]) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in started]


def trainer(folder: Path, name: str, ranks: Ranks | None = None) -> Trainer:
    recipe = read_recipe(folder / f"{name}.toml")
    data = folder / ("data" if recipe.model else "data-tuned")
    return Trainer(recipe, prepare(recipe, data), ranks=ranks)


def steps(trained: Trainer, count: int) -> dict[str, Any]:
    """What so many steps report, and held-out text after them."""
    reports = [trained.step() for _ in range(count)]
    return {
        **{key: [getattr(each, key) for each in reports] for key in MEASURES},
        "counts": [each.counts.tolist() for each in reports],
        "dropped": [each.dropped.tolist() for each in reports],
        "heldout": [trained.evaluate(5), trained.evaluate(3, at_capacity=True)],
    }


MEASURES = ("loss", "balance", "z", "grad_norm")


def layer(
    dispatch: Dispatcher,
    ops: TrainingOps,
    rows: slice,
    *,
    bias: bool,
    experts: list[int],
    kernels: bool = False,
) -> dict[str, Tensor]:
    """A layer's output and gradients, of some rows; only some experts are chosen.

    kernels: by those of a card, in the interpreter, whose products are a card's then, too: a row's
    do not depend on its place in a tile.
    """
    ops.kernels = kernels
    if kernels:
        from gpu_kernels.interpreting import sum_in_order

        sum_in_order(_PATCH)
    generator = torch.Generator().manual_seed(5)
    router = RouterConfig(EXPERTS, TOP_K)
    config = FeedForwardConfig(2 * SIZE, router, bias=bias)
    held = getattr(dispatch, "here", None)
    made = Experts(config, Place(ops, SIZE, 1e-6, torch.float32), EXPERTS, 2 * SIZE, held)
    whole = Experts(config, Place(TrainingOps(), SIZE, 1e-6, torch.float32), EXPERTS, 2 * SIZE)
    values = {n: torch.randn(p.shape, generator=generator) for n, p in whole.named_parameters()}
    made.load_state_dict({name: values[name] for name, _ in made.named_parameters()})
    x_TD = torch.randn(TOKENS, SIZE, generator=generator)[rows].requires_grad_()
    logits_TE = torch.randn(TOKENS, EXPERTS, generator=generator)
    for e in set(range(EXPERTS)) - set(experts):
        logits_TE[:, e] = -9.0
    weights_TK, ids_TK = logits_TE.softmax(-1).topk(TOP_K)
    kept_TK = torch.rand(TOKENS, TOP_K, generator=generator) < 0.8
    weights_TK = weights_TK[rows].clone().requires_grad_()
    torch.manual_seed(1)
    routing = Routing(weights_TK, ids_TK[rows], logits_TE[rows], kept_TK[rows])
    out_TD = dispatch(x_TD, routing, made)
    slope_TD = torch.randn(TOKENS, SIZE, generator=generator)[rows]
    (out_TD * slope_TD).sum().backward()
    found = {"out": out_TD, "x": x_TD.grad, "weights": weights_TK.grad}
    found |= {name: p.grad for name, p in made.named_parameters()}
    return {name: x.detach() for name, x in found.items() if x is not None}


LAYERS: dict[str, dict[str, Any]] = {
    "grouped": {"bias": False, "experts": [0, 2, 3, 4, 5, 6]},
    "in turn": {"bias": True, "experts": list(range(EXPERTS))},
    "one rank's": {"bias": False, "experts": [0, 1, 2]},
    "one rank's in turn": {"bias": True, "experts": [0, 1, 2]},
}
if find_spec("triton") is not None:
    LAYERS["by kernels"] = LAYERS["grouped"] | {"kernels": True}
    LAYERS["by kernels, with biases"] = LAYERS["in turn"] | {"kernels": True}
"""Layers whose gradients are compared: with grouped products or without, those of a card, in the
interpreter, and all experts that are chosen at rank 0."""


def in_every_run(name: str, ranks: int) -> bool:
    """All but what takes the interpreter a second a rank: of that the layer with most in it."""
    return "kernels" not in LAYERS[name] or (ranks == 2 and LAYERS[name]["bias"])


def local(name: str) -> dict[str, Tensor]:
    """The layer in one process."""
    return layer(LocalDispatcher(), _ops(), slice(None), **LAYERS[name])


def _ops() -> TrainingOps:
    ops = TrainingOps(0.1, 0.4, drops=True)
    ops.training = True
    return ops


class _Here(TrainingDispatcher):
    def __init__(self, ops: TrainingOps, ranks: Ranks) -> None:
        placed = Placement.linear({0: EXPERTS}, ranks.count).layers[0]
        super().__init__(ops, ranks, placed.held)
        self.here = placed.held[ranks.rank]


def measure(folder: Path, rank: int, *, whole: bool) -> None:
    """One rank's part in all that is compared, or in what every run compares of it."""
    ranks = Ranks.join(torch.device("cpu"), SECONDS)
    size = ranks.count
    rows = TOKENS // size
    for name, case in LAYERS.items():
        if not whole and not in_every_run(name, size):
            continue
        ops = _ops()
        mine = slice(rank * rows, (rank + 1) * rows)
        ops.tokens = RowsHere(ranks, mine.start, TOKENS)
        save_file(layer(_Here(ops, ranks), ops, mine, **case), folder / f"{name}-{size}-{rank}")
    for name, count in STEPS.items():
        trained = trainer(folder, name, ranks)
        found = steps(trained, count)
        weights = trained.weights()
        if rank == 0:
            (folder / f"{name}-{size}.json").write_text(json.dumps(found))
            save_file(weights, folder / f"{name}-{size}.weights")
    (folder / f"broken-{size}-{rank}").write_text(broken(folder, ranks))
    went_on = trainer(folder, "capacity", ranks)
    went_on.restore(folder / f"before-{size}")
    went_on.save(folder / f"again-{size}")
    for _ in range(HOPS):
        went_on.step()
    went_on.save(folder / f"before-{2 * size}")
    ranks.leave()


def broken(folder: Path, ranks: Ranks) -> str:
    """What a rank says where an expert that another may have is no number."""
    trained = trainer(folder, "capacity", ranks)
    for name, copy in trained.masters.copies.items():
        if name == "layers.1.mlp.experts.gate_proj.5":
            copy.data[0, 0] = float("nan")
    try:
        trained.step()
    except NumericalError as error:
        return str(error)
    return "nothing"


def command(folder: Path, name: str, rank: int, *arguments: str) -> None:
    """`moebius train` as one rank, which says into NAME-RANK.log and NAME-RANK.out."""
    for stream, ending in ((1, "out"), (2, "log")):
        os.dup2(os.open(folder / f"{name}-{rank}.{ending}", os.O_CREAT | os.O_WRONLY), stream)
    sys.argv = ["moebius", "train", *arguments]
    main()


def lose(folder: Path, how: signal.Signals) -> None:
    """Rank 1 of three gets a signal in the middle of a run; how the others end, and how soon."""
    recipe = str(folder / "endless.toml")
    options = ["--out", str(folder / how.name), "--rank-timeout", "8"]
    started = start(3, lambda rank: command(folder, how.name, rank, recipe, *options))
    while not (folder / how.name / "training" / "checkpoint.safetensors").exists():
        time.sleep(0.05)
    os.kill(started[1], how)
    codes = ended([started[0], started[2]])
    os.kill(started[1], signal.SIGKILL)
    codes += ended([started[1]])
    (folder / f"{how.name}.json").write_text(json.dumps(codes))


def refuse(
    folder: Path,
    name: str,
    recipes: list[str],
    *options: str,
    out: str = "",
    change: Callable[[], None] = lambda: None,
    only: int | None = None,
) -> None:
    """The command, a recipe a rank, with what cannot be; what each rank says, and how it ends.

    change: what makes rank 1 another. only: the rank that is started.
    """

    def act(rank: int) -> None:
        if only not in (None, rank):
            return
        if rank == 1:
            change()
        recipe = str(folder / f"{recipes[rank]}.toml")
        command(folder, name, rank, recipe, "--out", str(folder / (out or name)), *options)

    (folder / f"{name}.json").write_text(json.dumps(ended(start(len(recipes), act))))


def _older() -> None:
    moebius.__version__ = "0.0.7"


def _drawn_otherwise() -> None:
    """As a host does whose files or whose torch are others."""
    draw = begin.initial_weights

    def drawn(*arguments: Any) -> Iterator[tuple[str, Tensor]]:
        return ((name, 1.01 * x) for name, x in draw(*arguments))

    begin.initial_weights = drawn


def run(what: str, folder: Path) -> None:
    torch.set_flush_denormal(True)
    torch.set_num_threads(1)
    trainer(folder, "capacity")  # imports what the optimiser does not before it is made
    import moebius.cli.border
    import moebius.cli.commands  # noqa: F401 - once, and not in each of thirty processes

    gc.freeze()
    if what in ("compare", "whole"):
        for count in (2, 4):
            act = partial(measure, folder, whole=what == "whole")
            codes = ended(start(count, act))
            assert codes == [0] * count, f"the ranks ended with {codes}"
    elif what == "lose":
        for how in (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM):
            lose(folder, how)
    else:
        refuse(folder, "differ", ["capacity", "endless"])
        refuse(folder, "version", ["capacity"] * 2, change=_older)
        refuse(folder, "few", ["few"] * 3)
        refuse(folder, "uneven", ["capacity"] * 3)
        refuse(folder, "unwritable", ["capacity"] * 2, out="few.toml/out")
        refuse(folder, "missing", ["capacity", "nothing"])
        refuse(folder, "weights", ["capacity"] * 2, change=_drawn_otherwise)
        measured = ["--evaluate-only", "--rank-timeout", "20"]
        refuse(folder, "other text", ["bias", "other/bias"], *measured, out="base")
        shutil.rmtree(folder / "other" / "text")
        refuse(folder, "short", ["short", "other/short"])
        refuse(folder, "alone", ["capacity"] * 2, "--rank-timeout", "1", only=1)
        refuse(folder, "evaluated", ["bias"] * 2, "--evaluate-only", out="base")


if __name__ == "__main__":
    for part in sys.argv[2:]:
        run(part, Path(sys.argv[1]))
