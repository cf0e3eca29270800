"""Several processes train as one does: losses, gradients, checkpoints; and how they end early."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import moebius
from covering import rest
from moebius.errors import ConfigError, PeerError, StorageError
from moebius.train.export import export, figures_table
from moebius.train.ranks import Ranks
from moebius.train.run import main_from_recipe
from moebius.train.trainer import Trainer
from train import rank_side
from train.rank_side import HOPS, LAYERS, MEASURES, STEPS, TOKENS, in_every_run

ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
}
BASE = """
name = "{name}"
seed = 3
[corpus]
heldout_share = 0.1
[corpus.files]
code = "{library}"
[tokenizer]
vocab_size = 300
"""
TRAINING = """
[training]
steps = 50
row_length = 64
learning_rate = 0.001
warmup_steps = 5
dtype = "float32"
"""
SHAPE = """
[model]
hidden_size = 32
num_hidden_layers = 2
num_attention_heads = 2
num_key_value_heads = 1
head_dim = 16
num_experts_per_tok = 2
norm_topk_prob = true
moe_intermediate_size = 16
max_position_embeddings = 128
"""
QWEN = SHAPE + 'model_type = "qwen3_moe"\nnum_experts = 7\n'
DOTS = SHAPE + (
    'model_type = "dots1"\nn_routed_experts = 6\nintermediate_size = 32\nn_shared_experts = 1\n'
    "first_k_dense_replace = 1\nrouted_scaling_factor = 2.5\n"
)
LIMITS = """
[routing]
dropless = false
capacity_factor = 1.0
eval_capacity_factor = 1.0
second_policy = "random"
jitter = 0.01
"""
RECIPES = {
    "capacity": QWEN + TRAINING + "rows_per_step = 4\nfirst_choices = true" + LIMITS,
    "bias": DOTS + TRAINING + 'rows_per_step = 8\naccumulation = 2\nbalance = "global"\n'
    "bias_rate = 0.01",
    "tuned": TRAINING + 'rows_per_step = 4\nbalance = "sequence"\n[finetune]\ncheckpoint = "base"',
    "endless": QWEN + TRAINING.replace("= 50", "= 100000") + "rows_per_step = 3\n"
    "checkpoint_seconds = 0.0",
    "short": QWEN + TRAINING.replace("= 50", "= 2").replace("= 5\n", "= 1\n") + "rows_per_step = 4",
    "few": QWEN.replace("= 7", "= 2") + TRAINING + "rows_per_step = 3",
}


@pytest.fixture(scope="module", autouse=True)
def _flushed() -> Iterator[None]:
    """As the ranks do."""
    torch.set_flush_denormal(True)
    yield
    torch.set_flush_denormal(False)


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory, library: Path) -> Path:
    """A folder of them, with their data; `tuned` starts from two steps of `bias`.

    In `other` are some of them over another text, as on a host that has one.
    """
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "text").mkdir()
    for module in ("abc", "bisect", "fnmatch", "heapq", "keyword", "queue", "sched"):
        shutil.copy(library / f"{module}.py", folder / "text")
    for name, text in RECIPES.items():
        head = BASE.format(name=name, library=folder / "text")
        (folder / f"{name}.toml").write_text(head + text)
    base = rank_side.trainer(folder, "bias")
    base.step()
    export(base, folder / "base")
    other = folder / "other"
    (other / "text").mkdir(parents=True)
    shutil.copy(library / "cmd.py", other / "text")
    for name in ("bias", "short"):
        recipe = (folder / f"{name}.toml").read_text()
        (other / f"{name}.toml").write_text(recipe.replace(str(folder), str(other)))
    return folder


@pytest.fixture(scope="module")
def launched(recipes: Path, request: pytest.FixtureRequest) -> Path:
    """The folder, with what all groups of ranks left there: begun by one process, as to import what
    they need takes longer than most of them."""
    first = rank_side.trainer(recipes, "capacity")
    for _ in range(HOPS):
        first.step()
    first.save(recipes / "before-2")
    compared = "whole" if "exhaustive" in request.config.getoption("-m") else "compare"
    command = [sys.executable, rank_side.__file__, str(recipes), compared, "lose", "command"]
    done = subprocess.run(command, env=ENVIRONMENT, timeout=280, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr  # of all ranks: the first that failed says why
    return recipes


@pytest.fixture(scope="module")
def alone(recipes: Path) -> dict[str, tuple[dict[str, Any], Trainer]]:
    """What one process measures, and its trainers behind their last steps."""
    found = {}
    for name, count in STEPS.items():
        trained = rank_side.trainer(recipes, name)
        found[name] = rank_side.steps(trained, count), trained
    return found


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", STEPS)
def test_losses_are_those_of_one_process(
    launched: Path, alone: dict[str, tuple[dict[str, Any], Trainer]], name: str, ranks: int
) -> None:
    """Capacity, jitter, random second choices, dropout, a selection bias; experts that do not
    divide evenly. Every token goes where it goes in one process."""
    expected, trained = alone[name]
    found = json.loads((launched / f"{name}-{ranks}.json").read_text())
    for key in MEASURES:
        assert len(found[key]) == STEPS[name]
        near = pytest.approx(expected[key], abs=1e-5, rel=1e-4 if key == "grad_norm" else 0)
        assert found[key] == near, key
    assert found["counts"] == expected["counts"]
    assert torch.tensor(found["dropped"]).allclose(torch.tensor(expected["dropped"]), atol=1e-6)
    for mine, theirs in zip(found["heldout"], expected["heldout"], strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)
    weights = load_file(launched / f"{name}-{ranks}.weights")
    assert weights.keys() == trained.weights().keys()
    for weight, tensor in trained.weights().items():
        torch.testing.assert_close(weights[weight], tensor, rtol=0, atol=2e-5, msg=weight)
    if name == "capacity":
        assert 0.01 < torch.tensor(found["dropped"]).mean() < 0.9
    if name == "bias":
        biases = {n: x for n, x in weights.items() if n.endswith("selection_bias")}
        assert biases and all(x.abs().max() > 0.01 for x in biases.values())
        assert all(torch.equal(x, trained.weights()[n]) for n, x in biases.items())


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        (name, ranks) if in_every_run(name, ranks) else rest(name, ranks)
        for name in LAYERS
        for ranks in (2, 4)
    ],
)
def test_a_layer_and_its_gradients_are_one_processs_bit_for_bit(
    launched: Path, name: str, ranks: int
) -> None:
    """Choices dropped, dropout within experts, experts without a row and ranks without any."""
    expected = rank_side.local(name)
    rows = TOKENS // ranks
    seen = set()
    for rank in range(ranks):
        found = load_file(launched / f"{name}-{ranks}-{rank}")
        here = slice(rank * rows, (rank + 1) * rows)
        for key in ("out", "x", "weights"):
            assert torch.equal(found.pop(key), expected[key][here]), (rank, key)
        for key, gradient in found.items():
            assert torch.equal(gradient, expected.get(key, torch.zeros_like(gradient))), (rank, key)
        seen |= found.keys()
    assert seen >= {key for key, x in expected.items() if "proj" in key and x.any()}


def test_a_run_goes_on_with_any_number_of_ranks(launched: Path) -> None:
    """1, 2, 4 and 1 again: the files are the same, and the end is that of a run by one process."""
    for ranks in (2, 4):
        before = (launched / f"before-{ranks}").read_bytes()
        assert before == (launched / f"again-{ranks}").read_bytes(), "read, and written again"
    straight = rank_side.trainer(launched, "capacity")
    for _ in range(4 * HOPS):
        straight.step()
    last = rank_side.trainer(launched, "capacity")
    last.restore(launched / "before-8")
    assert last.done == 3 * HOPS
    for _ in range(HOPS):
        last.step()
    found = last.tensors()
    assert found.keys() == straight.tensors().keys()
    for name, tensor in straight.tensors().items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6, msg=name)


def test_what_is_no_number_is_named_by_all_ranks(launched: Path) -> None:
    """Expert 5 lies at one rank; its layer's outputs break at all of them."""
    said = {(launched / f"broken-{n}-{r}").read_text() for n in (2, 4) for r in range(n)}
    assert said == {
        "step 0: the loss is nan, and layer 1's feed-forward the first that is no number"
    }


def test_a_rank_that_is_lost_ends_the_others(launched: Path) -> None:
    """Killed: at once. Stopped: when the time is over. Asked to end: all, after the same step."""
    recipes = launched
    host = re.escape(socket.gethostname())
    for how in ("SIGKILL", "SIGSTOP", "SIGTERM"):
        codes = json.loads((recipes / f"{how}.json").read_text())
        resumed = rank_side.trainer(recipes, "endless")
        resumed.restore(recipes / how / "training" / "checkpoint.safetensors")
        assert resumed.done >= 1
        if how == "SIGTERM":
            assert codes == [130, 130, 130]
            continue
        assert codes == [1, 1, -signal.SIGKILL], how
        for rank in (0, 2):
            said = (recipes / f"{how}-{rank}.log").read_text().splitlines()[-1]
            assert re.match(
                rf"moebius: step \d+: rank {rank} of 3 on {host}: of ranks .*1.* one or more ended,"
                r" or did not come within 8 s .*training stopped, the checkpoint before is whole",
                said,
            ), said


def test_what_cannot_be_is_one_line_that_names_rank_and_host(launched: Path) -> None:
    recipes = launched
    host = socket.gethostname()
    lines = {
        "differ": f"rank 1 of 2 on {host} has recipe ",
        "version": f"rank 1 of 2 on {host} has moebius 0.0.7, but rank 0 of 2 on {host} has "
        f"moebius {moebius.__version__}; all ranks must be started alike",
        "few": f"rank 0 of 3 on {host}: 3 ranks cannot share the 2 experts of a layer",
        "uneven": f"rank 0 of 3 on {host}: the 4 rows of a micro-batch (training.rows_per_step = "
        "4, accumulation = 1) cannot be shared by 3 ranks evenly",
        "unwritable": f"rank 0 of 2 on {host}: ",
        "weights": f"rank 1 of 2 on {host} has weights ",
        "other text": f"rank 1 of 2 on {host} has text ",
        "missing": f"rank 1 of 2 on {host}: the recipe {recipes}/nothing.toml cannot be read",
    }
    for name, line in lines.items():
        codes = json.loads((recipes / f"{name}.json").read_text())
        assert codes == [2] * len(codes), name
        for rank in range(len(codes)):
            assert [said.startswith(f"moebius: {line}") for said in _said(recipes, name, rank)] == [
                True
            ], (name, rank)
    (said,) = _said(recipes, "alone", 1)
    assert said.startswith(f"moebius: rank 1 of 2 on {host} found no group of 2 at 127.0.0.1:")
    assert json.loads((recipes / "alone.json").read_text()) == [0, 2]


def _said(folder: Path, name: str, rank: int) -> list[str]:
    lines = (folder / f"{name}-{rank}.log").read_text().splitlines()
    return [line for line in lines if line.startswith("moebius:")]


def test_ranks_measure_a_model_together(launched: Path) -> None:
    """As one process does, and the first of them says it."""
    recipes = launched
    assert json.loads((recipes / "evaluated.json").read_text()) == [0, 0]
    figures = main_from_recipe(recipes / "bias.toml", recipes / "base", evaluate_only=True)
    assert (recipes / "evaluated-0.out").read_text() == figures_table(figures) + "\n"
    assert (recipes / "evaluated-1.out").read_text() == ""


def test_only_rank_0_needs_the_texts(launched: Path, tmp_path: Path) -> None:
    """Where they lie elsewhere on another host, or nowhere, ranks read what it has prepared; what
    they leave is what one process does, within rounding."""
    codes = json.loads((launched / "short.json").read_text())
    assert codes == [0, 0], _said(launched, "short", 0)
    main_from_recipe(launched / "short.toml", tmp_path / "alone")
    both, alone = (
        {path.relative_to(out) for path in out.rglob("*") if path.is_file()}
        for out in (launched / "short", tmp_path / "alone")
    )
    assert both == alone
    for name in ("model", "training/checkpoint"):
        there, here = (
            load_file(out / f"{name}.safetensors")
            for out in (launched / "short", tmp_path / "alone")
        )
        assert there.keys() == here.keys()
        for key, tensor in here.items():
            torch.testing.assert_close(there[key], tensor, rtol=1e-2, atol=1e-4, msg=key)


class Told(Ranks):
    """The first of some ranks, whose others tell what they are made with."""

    def __init__(self, *others: Any) -> None:
        super().__init__(0, 1 + len(others))
        self._told = list(others)

    def all_gather_json(self, what: Any) -> list[Any]:
        return [what, *self._told]


def test_all_that_ranks_differ_in_is_told() -> None:
    facts = {f"fact {number}": number for number in range(6)}
    there = "rank 1 of 2 on there"
    Told([there, facts]).require_same(facts)
    other = facts | {"fact 1": 7, "fact 4": "x", "new": 8}
    with pytest.raises(ConfigError) as caught:
        Told([there, other]).require_same(facts)
    assert str(caught.value) == (
        f"{there} has fact 1 7, fact 4 x, new 8, but rank 0 of 2 on {socket.gethostname()} has "
        "fact 1 1, fact 4 4, new None; all ranks must be started alike"
    )


def test_a_lost_rank_is_told_in_few_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """gloo's own words, as torch 2.13 has them."""

    def reset(*_: Any) -> None:
        raise RuntimeError(
            "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error "
            "[127.0.0.1]:54413: Connection reset by peer. This is typically caused by a remote "
            "worker hanging or bugs in the application. Good luck!\nmore"
        )

    monkeypatch.setattr(torch.distributed, "all_reduce", reset)
    with pytest.raises(PeerError) as caught:
        Ranks(1, 3, timeout=5).all_reduce_max(1.0)
    assert caught.value.ranks == (0, 2)
    assert str(caught.value) == (
        f"rank 1 of 3 on {socket.gethostname()}: of ranks 0, 2 one or more ended, or did not come "
        "within 5 s (Read error [127.0.0.1]:54413: Connection reset by peer)"
    )


class Mirrored(Ranks):
    """One of two ranks, the other of which sends the same."""

    def all_gather(self, counts: Tensor) -> Tensor:
        return torch.stack((counts, counts))


def test_the_name_of_a_file_need_not_be_text() -> None:
    """Another rank hears of a file whose name is bytes in no encoding."""
    ranks = Mirrored(0, 2)
    name = os.fsdecode(b"/caf\xe9")
    assert (
        ranks.all_gather_json({"name": name, "long": "\U0001f600\x01" * 300})
        == [{"name": name, "long": "\U0001f600\x01" * 300}] * 2
    )

    def refuse() -> None:
        raise FileNotFoundError(2, "No such file or directory", name)

    with pytest.raises(StorageError, match=r"rank 0 of 2 on .*: /caf.: No such file"):
        ranks.together(refuse)


def test_a_host_has_a_device_for_each_of_its_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    host = re.escape(socket.gethostname())
    with pytest.raises(ConfigError, match=f"rank 3 is number 1 on {host}, which has 1 CUDA device"):
        main_from_recipe(Path("none.toml"), Path("none"))
