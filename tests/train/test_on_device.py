"""Training as on a CUDA device, without one: grouped products in Triton's interpreter, a step in
which nobody reads a value, and one on the meta device, where host and device cannot be mixed."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

pytest.importorskip("triton")

from covering import chosen
from gpu_kernels.interpreting import hurrying
from gpu_kernels.standing_in import HostRead, no_host_reads
from moebius.errors import MemoryPlanError
from moebius.moe.training import TrainingRouting
from moebius.nn.rope import Rotary
from moebius.train import experts as experts_module
from moebius.train import run as run_module
from moebius.train.data import PreparedData
from moebius.train.loop import run
from moebius.train.ranks import Ranks
from moebius.train.recipe import Recipe
from moebius.train.step import StepReport, StepSums
from moebius.train.trainer import Trainer

DROPS = TrainingRouting(dropless=False, capacity_factor=0.8, jitter=0.01, second_policy="random")
SIGMOID = {
    "model_type": "deepseek_v3",
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "intermediate_size": 32,
}
BIASED = {
    "model_type": "gpt_oss",
    "num_local_experts": 4,
    "intermediate_size": 16,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"],
}


@pytest.fixture(scope="session", autouse=True)
def _the_interpreter_hurries() -> Iterator[None]:
    with nullcontext() if torch.cuda.is_available() else hurrying():
        yield


def changed(recipe: Recipe, name: str) -> Recipe:
    """The recipe with another router, other limits or other accumulation."""
    training: dict[str, Any] = {"dtype": "float32", "learning_rate": 0.003, "row_length": 24}
    more: dict[str, Any] = {}
    assert recipe.model is not None
    if name == "drops":
        more = {"routing": DROPS}
        training |= {"balance": "global"}
    common = {
        key: recipe.model[key]
        for key in (
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "max_position_embeddings",
            "num_experts_per_tok",
        )
    }
    if name == "sigmoid":
        training |= {"bias_rate": 0.01, "balance": "sequence", "first_choices": True}
        more = {
            "model": common
            | SIGMOID
            | {"num_key_value_heads": 4, "moe_intermediate_size": 16, "norm_topk_prob": True}
        }
    if name == "biased":
        more = {"model": common | BIASED | {"head_dim": 8}}
    return dataclasses.replace(
        recipe, training=dataclasses.replace(recipe.training, **training), **more
    )


NAMES = ("dropless", "drops", "sigmoid", "biased")


@pytest.fixture
def grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts by grouped products, in the interpreter, by small tiles."""
    from moebius.ops.triton import grouped
    from moebius.ops.triton.tiles import Tile

    monkeypatch.setattr(experts_module, "has_kernels", lambda device: True)
    monkeypatch.setitem(grouped.TILES, 2, Tile(64, 32, 32))
    monkeypatch.setitem(grouped.TILES, 4, Tile(64, 32, 32))


@pytest.mark.parametrize("name", chosen(NAMES, {"drops", "biased"}.__contains__))
def test_losses_are_those_of_the_other_path(
    recipe: Recipe, data: PreparedData, name: str, monkeypatch: pytest.MonkeyPatch, grouped: None
) -> None:
    """Losses, drops and counts of some steps, within what another order of sums makes of them."""
    case = changed(recipe, name)
    ours = Trainer(case, data)
    assert ours.decoder.ops.kernels
    monkeypatch.setattr(experts_module, "has_kernels", lambda device: False)
    theirs = Trainer(case, data)
    launched = []
    from moebius.ops.triton import grouped as grouped_module

    product = grouped_module.grouped_product
    monkeypatch.setattr(
        grouped_module,
        "grouped_product",
        lambda *args: launched.append(1) or product(*args),
    )
    for _ in range(2):
        found = ours.step()
        of_ours = len(launched)
        wanted = theirs.step()
        assert of_ours and len(launched) == of_ours
        assert found.loss == pytest.approx(wanted.loss, rel=2e-5)
        assert found.balance == pytest.approx(wanted.balance, rel=1e-3)
        assert found.z == pytest.approx(wanted.z, rel=1e-4)
        assert found.grad_norm == pytest.approx(wanted.grad_norm, rel=1e-3)
        assert (found.counts - wanted.counts).abs().sum() <= 4
        torch.testing.assert_close(found.dropped, wanted.dropped, atol=0.01, rtol=0)
    if name == "drops":
        assert wanted.dropped.min() > 0


@contextmanager
def _reading_allowed() -> Iterator[None]:
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        yield


@pytest.mark.parametrize("name", chosen(NAMES, {"drops", "sigmoid"}.__contains__))
def test_a_step_reads_the_device_once(
    recipe: Recipe, data: PreparedData, name: str, monkeypatch: pytest.MonkeyPatch, grouped: None
) -> None:
    """From its batch to its last update, but for the report, nothing waits and nothing comes from
    the host: what a CUDA graph's recording would refuse."""
    trainer = Trainer(changed(recipe, name), data)
    trainer.step()  # what is made once, is made then
    batch = trainer._batches.batch(1)
    monkeypatch.setattr(trainer._batches, "batch", lambda step: batch)
    reads = []
    honest = StepSums.report

    def report(self: StepSums, norm: Tensor, rate: float) -> StepReport:
        reads.append(rate)
        with _reading_allowed():
            return honest(self, norm, rate)

    monkeypatch.setattr(StepSums, "report", report)
    with no_host_reads():
        trainer.step()
    assert len(reads) == 1


def test_the_detector_sees_the_path_that_counts_on_the_host(
    recipe: Recipe, data: PreparedData
) -> None:
    trainer = Trainer(changed(recipe, "drops"), data)
    with pytest.raises(HostRead), no_host_reads():
        trainer.step()


# By what torch's documentation names as adding up in any order on a GPU, or as it is implemented
# there: each is right only where no two numbers that round meet in one place.
UNORDERED = {
    "index_add",
    "index_add_",
    "scatter_add",
    "scatter_add_",
    "scatter_reduce",
    "put_",
    "index_put",
    "index_put_",
    "cumsum",
    "histc",
    "bincount",
    "kthvalue",
    "_embedding_bag",
    "grid_sampler_2d_backward",
    "median",
}


class _Unordered(TorchDispatchMode):
    """Sums over places that several numbers share, of numbers whose sums are rounded."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.seen += 1
        if name in UNORDERED and not self._is_ordered(name, args):
            self.found.append(name)
        return func(*args, **(kwargs or {}))

    def _is_ordered(self, name: str, args: Any) -> bool:
        target = args[0]
        if not target.is_floating_point():
            return True
        if name in ("scatter_add", "scatter_add_"):
            _, dim, index, source = args
            whole = bool((source == source.round()).all())
            ordered = index.sort(dim).values
            apart = bool((ordered.diff(dim=dim) != 0).all())
            return whole or apart
        if name in ("index_put", "index_put_"):
            accumulate = len(args) > 3 and args[3]
            return not accumulate
        return False


@pytest.mark.parametrize("name", chosen(NAMES, lambda name: name != "dropless"))
def test_no_sum_depends_on_who_comes_first(
    recipe: Recipe, data: PreparedData, name: str, grouped: None
) -> None:
    """So two runs on one card are the same bits, as far as each operation is by itself."""
    trainer = Trainer(changed(recipe, name), data)
    with _Unordered() as mode:
        trainer.step()
    assert not mode.found and mode.seen > 500


def test_that_detector_sees_torch_s_own_gradient_of_a_choice_of_rows() -> None:
    x_TD = torch.randn(3, 4, requires_grad=True)
    with _Unordered() as mode:
        x_TD.index_select(0, torch.tensor([0, 0, 2])).sum().backward()
    assert mode.found == ["index_add"] or mode.found == ["index_add_"]


@pytest.mark.parametrize("name", ["dropless", "drops", "sigmoid"])
def test_host_and_device_never_meet(
    recipe: Recipe, data: PreparedData, name: str, monkeypatch: pytest.MonkeyPatch, grouped: None
) -> None:
    """On the meta device an operation on a tensor of each is an error, and so is reading."""
    from moebius.ops.triton import grouped as grouped_module

    def product(x_PI: Tensor, groups: Any, matrices: Any) -> Tensor:
        assert x_PI.is_meta and groups.starts.is_meta and matrices.table.is_meta
        weight = matrices.held[0]
        return (x_PI.unsqueeze(1) * weight).sum(-1)

    monkeypatch.setattr(grouped_module, "grouped_product", product)
    monkeypatch.setattr(experts_module, "_fits", lambda weights: True)
    monkeypatch.setattr(
        "moebius.train.masters._adamw", lambda masters, training: torch.optim.SGD(list(masters))
    )
    case = changed(recipe, name)
    case = dataclasses.replace(case, training=dataclasses.replace(case.training, accumulation=3))
    trainer = Trainer(case, data, device="meta")
    honest = Rotary.__call__

    def call(self: Rotary, positions_T: Tensor) -> Any:
        self._inverse_R = self._inverse_R.to(positions_T.device)
        return honest(self, positions_T)

    monkeypatch.setattr(Rotary, "__call__", call)
    # There is no autocast for meta to turn off.
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
    batch = trainer._batches.batch(0)
    sums = StepSums(len(trainer._routers), trainer._num_experts, trainer.device)
    loads = trainer._loads(batch) if name == "drops" else None
    trainer._micro_batch(batch, 0, loads, sums)
    assert trainer.masters.gradient.is_meta and sums.vector.is_meta
    trainer.masters.move_biases(sums.counts_SE, 0.01)
    trainer.masters.round()


def test_too_little_memory_of_a_device_is_one_line_with_numbers(
    recipe: Recipe, data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(recipe, data)
    honest = trainer.masters.update

    def update(rate: float) -> None:
        if trainer.done == 5:
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of"
            )
        honest(rate)

    monkeypatch.setattr(trainer.masters, "update", update)
    with pytest.raises(
        MemoryPlanError,
        match=r"^step 5, of micro-batches of 3 rows of 48 tokens: the device's memory is too small "
        r"\(CUDA out of memory\); weights, gradients and optimiser take 0\.00 GiB; raise "
        r"training\.accumulation, or lower .*; training stopped, the checkpoint before is whole$",
    ):
        run(trainer, tmp_path)
    assert trainer.done == 5


def test_a_model_that_is_too_large_for_the_device_is_told_at_start(
    recipe: Recipe, data: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0")

    monkeypatch.setattr(Trainer, "_decoder", full)
    with pytest.raises(MemoryPlanError, match=r"^the model: the device's memory is too small"):
        Trainer(recipe, data)


def test_too_little_memory_to_measure_with_is_told_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All else that computes on a device, the held-out text's scores among it."""

    def full(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0")

    monkeypatch.setattr(run_module, "_evaluate", full)
    recipe = Path(__file__).parents[2] / "recipes" / "tiny.toml"
    with pytest.raises(
        MemoryPlanError,
        match=r"^measuring: the device's memory is too small \(CUDA out of memory\); lower ",
    ):
        run_module.main_from_recipe(recipe, tmp_path, evaluate_only=True, device="cpu")


def _unset(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Whatever it is set to meanwhile, afterwards it is as it was."""
    monkeypatch.setenv(name, "")
    monkeypatch.delenv(name)


def test_ranks_on_devices_meet_by_nccl_each_at_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is told to torch, as no NCCL is here."""
    told: dict[str, Any] = {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    _unset(monkeypatch, "TORCH_NCCL_BLOCKING_WAIT")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: told.update(current=device))
    monkeypatch.setattr(
        torch.distributed,
        "init_process_group",
        lambda backend, timeout, device_id: told.update(backend=backend, device_id=device_id),
    )
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    device = torch.device("cuda", 1)
    ranks = Ranks.join(device, 7.0)
    assert (ranks.rank, ranks.count, ranks.device) == (1, 2, device)
    assert told == {"current": device, "backend": "nccl", "device_id": device}
    assert os.environ["TORCH_NCCL_BLOCKING_WAIT"] == "1"


def test_bytes_that_are_told_are_those_that_lie_there(recipe: Recipe, data: PreparedData) -> None:
    trainer = Trainer(recipe, data)
    trainer.step()
    state = trainer.masters.state()
    there = sum(x.nbytes for kind in state.values() for x in kind.values())
    there += sum(x.nbytes for x in trainer.decoder.parameters()) + trainer.masters.gradient.nbytes
    assert trainer.masters.nbytes == there


@pytest.mark.parametrize("reason", ["", "triton 3.1 is too old; pip install 'triton>=3.6'"])
def test_a_card_without_kernels_trains_and_says_what_it_costs(
    reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(experts_module, "why_not", lambda device: reason)
    assert experts_module.has_kernels(torch.device("cuda")) == (not reason)
    assert not experts_module.has_kernels(torch.device("cpu"))
    assert [record.getMessage() for record in caplog.records] == (
        ["experts are computed one after the other, and each layer waits for the device: " + reason]
        if reason
        else []
    )


def test_cublas_is_told_to_repeat_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    _unset(monkeypatch, "CUBLAS_WORKSPACE_CONFIG")
    assert run_module._device("auto") == torch.device("cuda", 0)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
