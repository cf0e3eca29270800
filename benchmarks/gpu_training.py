"""One stage of benchmarks/gpu.sh that trains on a card, and leaves a record, OUT/STAGE.json, after
every figure.

    python benchmarks/gpu_training.py STAGE --out OUT [--device cuda|cpu] [--small]

    training  the bundled recipe's model: losses of the first steps beside the CPU's, whether a run
              is the same bits twice, tokens a second at the recipe's batch and at one that fills a
              card, and the share of the matrix peak, in bfloat16 and in float32
    grouped   products of experts by our kernels, forwards and backwards, beside torch's grouped_mm
              and one dense product of as many rows
    claim-2   row 2 of the claims, less time, of a pair that fills a card: a width of 1,024 and
              32,768 tokens a step; curves and seconds at each point

The text is the standard library of this Python, the tokenizer the bundled one. The peak is that
which the stage `environment` has measured before, in OUT. --small trains a model of some kilobytes:
a rehearsal, whose figures mean nothing.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import tomllib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "peers")]

import gpu  # noqa: E402
from gpu import Stage, prepared, seconds  # noqa: E402
from gpu_figures import share  # noqa: E402

FIRST_STEPS = 3
TURNS = 3
STEPS_A_TURN = 10
FULL_ROWS = 128
"""Rows of 512 tokens, a step that fills a card."""
PAIR = {"width": 1024, "rows": 256, "steps": 600, "every": 50}


def folder(stage: Stage) -> Path:
    return Path(tempfile.gettempdir()) / "moebius-gpu" / f"training-{stage.small}"


def corpus(stage: Stage) -> Path:
    from claims.experiments import write_corpus

    path = folder(stage) / "corpus"
    if not (path / "tables.jsonl").exists():
        write_corpus(path)
        if stage.small:  # to make tokens of all of it takes as long as all else
            for file in path.glob("*.jsonl"):
                lines = file.read_text().splitlines()[:60]
                file.write_text("\n".join(lines) + "\n")
    return path


def bundled(stage: Stage, dtype: str, rows: int | None = None) -> Any:
    """The bundled recipe over that text, or a small model's."""
    from claims.experiments import DOMAINS
    from moebius.train.recipe import Recipe
    from moebius.train.tables import CorpusRecipe, TokenizerRecipe, TrainingRecipe

    table = tomllib.loads((ROOT / "recipes" / "bundled.toml").read_text())
    text = corpus(stage)
    training = TrainingRecipe(**table["training"] | {"dtype": dtype})
    model = table["model"]
    if stage.small:
        sizes = {"hidden_size": 32, "head_dim": 8, "num_hidden_layers": 2, "num_experts": 4}
        model = model | sizes | {"moe_intermediate_size": 16}
        training = replace(training, row_length=32)
    if rows is not None:
        training = replace(training, rows_per_step=rows)
    return Recipe(
        name="bundled",
        seed=1,
        model=model,
        training=training,
        corpus=CorpusRecipe(
            {kind: (str(text / f"{kind}.jsonl"),) for kind in DOMAINS}, heldout_share=0.08
        ),
        tokenizer=TokenizerRecipe(path=str(ROOT / "src" / "moebius" / "bundled")),
    )


def trainer_of(stage: Stage, recipe: Any, device: str | None = None) -> Any:
    from moebius.train.data import prepare
    from moebius.train.trainer import Trainer

    data = prepare(recipe, folder(stage) / "data")
    return Trainer(recipe, data, device=device or stage.device)


def training(stage: Stage) -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch

    from moebius import __version__

    torch.set_flush_denormal(True)
    here = trainer_of(stage, bundled(stage, "float32"))
    stage.keep(
        moebius=__version__,
        parameters=sum(each.numel() for each in here.decoder.parameters()),
        kernels=here.decoder.ops.kernels,
    )
    beside_cpu(stage, here)
    for dtype in ("bfloat16", "float32"):
        twice(stage, dtype)
        for rows in (None, 4 if stage.small else FULL_ROWS):
            rate(stage, dtype, rows)


def beside_cpu(stage: Stage, here: Any) -> None:
    """Losses and norms of the first steps in float32, of the same rows and first weights."""
    there = trainer_of(stage, here.recipe, "cpu")
    steps: list[dict[str, Any]] = []
    for _ in range(FIRST_STEPS):
        mine = here.step()
        other = there.step()
        found = {"loss": mine.loss, "cpu_loss": other.loss}
        steps.append(found | {"norm": mine.grad_norm, "cpu_norm": other.grad_norm})
        stage.keep(first_steps=steps)


def twice(stage: Stage, dtype: str) -> None:
    """Whether the same steps from the same start leave the same bits, as a resumed run needs."""
    import torch

    recipe = bundled(stage, dtype)
    ends = []
    for _ in range(2):
        trainer = trainer_of(stage, recipe)
        reports = [trainer.step() for _ in range(FIRST_STEPS)]
        ends.append(([each.loss for each in reports], trainer.tensors()))
    differ = sum(not torch.equal(ends[0][1][name], ends[1][1][name]) for name in ends[0][1])
    same = {"losses": ends[0][0] == ends[1][0], "tensors_that_differ": differ}
    stage.keep(**{f"{dtype}_twice": same})


def rate(stage: Stage, dtype: str, rows: int | None) -> None:
    recipe = bundled(stage, dtype, rows)
    trainer = trainer_of(stage, recipe)
    count = 1 if stage.small else STEPS_A_TURN

    def steps() -> None:
        for _ in range(count):
            trainer.step()

    steps()  # what is compiled, is by then
    walls = [seconds(steps, stage.device) / count for _ in range(TURNS)]
    tokens = recipe.training.tokens_per_step
    step = statistics.median(walls)
    operations = step_operations(trainer, recipe)
    found = {
        "tokens_a_step": tokens,
        "step_s": walls,
        "tokens_per_second": tokens / step,
        "operations": operations,
        "share_of_matrix_peak": share(stage, operations / step, "flops_per_second"),
        "loss": trainer.step().loss,
    }
    stage.keep(**{f"{dtype}_{tokens}_tokens": found})


def step_operations(trainer: Any, recipe: Any) -> int:
    """Of the products of a step, forwards and twice that backwards: weights that a token meets, the
    vocabulary's once, and attention over the half of a row."""
    from moebius.train.export import parameter_counts

    active = parameter_counts(trainer.decoder)[1]
    model = recipe.model
    length = recipe.training.row_length
    attended = model["num_attention_heads"] * model["head_dim"] * length
    each = 2 * active + 2 * model["num_hidden_layers"] * attended
    return int(3 * each * recipe.training.tokens_per_step)


def grouped(stage: Stage) -> None:
    """Of Qwen3-30B-A3B's experts, by 32,768 rows of gate, and of the bundled model's, by 12,288."""
    if stage.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    sizes = {"qwen3_30b": (128, 768, 2048, 32_768), "bundled": (16, 128, 256, 12_288)}
    if stage.small:
        sizes = {"small": (4, 16, 24, 40)}
    torch.manual_seed(0)
    for name, (experts, outer, inner, rows) in sizes.items():
        for dtype in (torch.bfloat16, torch.float32):
            label = f"{name}_{str(dtype).removeprefix('torch.')}"
            one_size(stage, label, (experts, outer, inner, rows), dtype)


def one_size(stage: Stage, label: str, sizes: tuple[int, int, int, int], dtype: Any) -> None:
    import torch

    from moebius.ops.triton.grouped import Groups, Matrices, grouped_product

    experts, outer, inner, rows = sizes
    device = stage.device
    ids = torch.randint(experts, (rows,), device=device).sort().values
    x = torch.randn(rows, inner, device=device, dtype=dtype, requires_grad=True)
    stacked = torch.randn(experts, outer, inner, device=device, dtype=dtype, requires_grad=True)
    own = [each.detach().requires_grad_() for each in stacked.detach().unbind()]
    grad = torch.randn(rows, outer, device=device, dtype=dtype)
    groups = Groups.of(ids, experts)
    matrices = Matrices.of(own)
    ends = groups.starts[1:-1].contiguous()

    def ours() -> Any:
        return grouped_product(x, groups, matrices)

    def theirs() -> Any:
        return torch.nn.functional.grouped_mm(x, stacked.transpose(1, 2), offs=ends)

    def dense() -> Any:
        return x @ stacked[0].T

    ways: dict[str, Callable[[], Any]] = {"ours": ours, "grouped_mm": theirs, "dense": dense}
    found: dict[str, Any] = {}
    for name, way in ways.items():
        try:
            found[name] = timed(stage, way, grad, 2 * rows * outer * inner)
        except Exception as error:  # as torch's own does on some cards
            found[name] = {"failed": f"{type(error).__name__}: {error}"[:300]}
        stage.keep(**{label: found})


def timed(stage: Stage, way: Callable[[], Any], grad: Any, operations: int) -> dict[str, Any]:
    def whole() -> None:
        way().backward(grad)

    turns = 1 if stage.small else 6
    forward = statistics.median([seconds(way, stage.device) for _ in range(1 + turns)][1:])
    both = statistics.median([seconds(whole, stage.device) for _ in range(1 + turns)][1:])
    peak = partial(share, stage, peak="flops_per_second")
    return {
        "forward_s": forward,
        "forward_and_backward_s": both,
        "share_of_matrix_peak": peak(operations / forward),
        "share_with_backward": peak(3 * operations / both),
    }


def claim_2(stage: Stage) -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    from claims.measure import train_pair
    from claims.report import less_time

    corpus(stage)
    sizes = {"width": 32, "rows": 4, "steps": 10, "every": 5} if stage.small else PAIR

    def told(result: dict[str, Any]) -> None:
        verdict, figures = less_time({"pair": {1: result}})
        stage.keep(verdict=verdict, figures=figures, **result)

    options = {"rows_per_step": sizes["rows"], "dtype": "bfloat16", "learning_rate": 1e-3}
    found = train_pair(
        1,
        folder(stage),
        sizes["steps"],
        device=stage.device,
        width=sizes["width"],
        training=options,
        curve_every=sizes["every"],
        told=told,
    )
    stage.keep(**found)


STAGES: dict[str, Callable[[Stage], None]] = {
    "training": training,
    "grouped": grouped,
    "claim-2": claim_2,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    stage = prepared(parser, STAGES)
    gpu.run(stage, lambda: STAGES[stage.name](stage))


if __name__ == "__main__":
    sys.exit(main())
