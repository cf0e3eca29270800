from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from covering import chosen
from moebius.errors import ConfigError, NumericalError, StorageError, WeightsError
from moebius.models.decoder import Decoder
from moebius.moe.training import TrainingRouting
from moebius.nn.packed import PackedPast
from moebius.ops.reference import ReferenceOps
from moebius.train import trainer as trainer_module
from moebius.train.data import PreparedData
from moebius.train.loop import run
from moebius.train.recipe import Recipe
from moebius.train.trainer import Trainer


def _equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


def _saved_step(path: Path) -> int:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["moebius"])["step"]


def test_twelve_steps_are_six_and_six_resumed(
    recipe: Recipe, data: PreparedData, tmp_path: Path
) -> None:
    straight = Trainer(recipe, data)
    losses = [straight.step().loss for _ in range(12)]
    first = Trainer(recipe, data)
    halves = [first.step().loss for _ in range(6)]
    first.save(tmp_path / "checkpoint.safetensors")
    second = Trainer(recipe, data)
    second.step()
    second.restore(tmp_path / "checkpoint.safetensors")
    assert second.done == 6
    halves += [second.step().loss for _ in range(6)]
    assert halves == losses
    assert _equal(second.tensors(), straight.tensors())
    assert not _equal(first.tensors(), straight.tensors())


def test_resumed_before_the_first_step(recipe: Recipe, data: PreparedData, tmp_path: Path) -> None:
    fresh = Trainer(recipe, data)
    fresh.save(tmp_path / "c.safetensors")
    resumed = Trainer(recipe, data)
    resumed.restore(tmp_path / "c.safetensors")
    assert [fresh.step().loss for _ in range(3)] == [resumed.step().loss for _ in range(3)]


def test_a_run_that_was_interrupted_ends_like_one_that_was_not(
    recipe: Recipe, data: PreparedData, tmp_path: Path
) -> None:
    run(Trainer(recipe, data), tmp_path / "whole")

    def interrupt(step: int, report: object) -> None:
        if step == 7:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(Trainer(recipe, data), tmp_path / "parts", interrupt)
    assert _saved_step(tmp_path / "parts" / "checkpoint.safetensors") == 7
    run(Trainer(recipe, data), tmp_path / "parts")
    whole, parts = (
        load_file(tmp_path / name / "checkpoint.safetensors") for name in ("whole", "parts")
    )
    assert _equal(whole, parts)
    lines = [
        json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines] == [4, 6, 8, 12]
    assert [line["step"] for line in lines if "heldout_bits_per_byte" in line] == [6, 12]
    for line in lines:
        assert [sum(layer) for layer in line["expert_load"]] == [pytest.approx(1, abs=1e-3)] * 2
        assert 0 < line["loss"] < 10
        assert all(0 <= violation <= 3 for violation in line["max_violation"])
        assert line["dropped"] == [0, 0] and all(
            0 < entropy <= 1 for entropy in line["load_entropy"]
        )
    again = [
        json.loads(line) for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()
    ]
    times = {"seconds": 0, "tokens_per_second": 0}
    assert [line | times for line in again] == [line | times for line in lines]
    assert not list(tmp_path.rglob("*.partial"))


def test_it_learns_and_the_first_loss_is_that_of_guessing(
    recipe: Recipe, data: PreparedData
) -> None:
    longer = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, steps=40))
    trainer = Trainer(longer, data)
    losses = [trainer.step().loss for _ in range(40)]
    assert losses[0] == pytest.approx(torch.tensor(320.0).log().item(), abs=0.1)
    assert sum(losses[-5:]) / 5 < losses[0] - 1.0


def test_one_step_is_adamw_on_the_naive_loss(recipe: Recipe, data: PreparedData) -> None:
    """The update, from losses written out in float32 with the reference operations."""
    training = dataclasses.replace(recipe.training, clip_norm=0.05)
    recipe = dataclasses.replace(recipe, training=training)
    trainer = Trainer(recipe, data)
    naive = Decoder(trainer.decoder.config, ReferenceOps())
    naive.load_state_dict({name: p.float() for name, p in trainer.decoder.state_dict().items()})
    batch = trainer._batches.batch(0)
    past = PackedPast(48, batch.document_RL.flatten())
    hidden, routings = naive(batch.input_RL.flatten(), torch.arange(48).repeat(3), past)
    loss = torch.nn.functional.cross_entropy(naive.logits(hidden), batch.target_RL.flatten())
    balance, z = 0.0, 0.0
    for routing in routings:
        share = torch.nn.functional.one_hot(routing.expert_ids_TK, 4).float().mean((0, 1))
        balance += 4 * (share * routing.logits_TE.softmax(-1).mean(0)).sum() / 2
        z += routing.logits_TE.logsumexp(-1).square().mean() / 2
    (loss + 0.01 * balance + 0.001 * z).backward()
    norm = torch.cat([p.grad.flatten() for p in naive.parameters()]).norm()
    report = trainer.step()
    assert report.loss == pytest.approx(loss.item(), rel=1e-2)
    assert report.balance == pytest.approx(balance.item(), rel=1e-2)
    assert report.z == pytest.approx(z.item(), rel=1e-2)
    assert report.grad_norm == pytest.approx(norm.item(), rel=0.05)
    assert report.learning_rate == pytest.approx(0.01 / 3)
    for name, parameter in naive.named_parameters():
        grad = parameter.grad * 0.05 / norm
        mean = trainer.tensors()[f"mean.{name}"]
        # beta1 = 0.9: the first moment is a tenth of the clipped gradient.
        # In bfloat16 a few tokens near a tie choose another expert.
        assert (mean * 10 - grad).norm() < (0.4 if ".experts." in name else 0.1) * grad.norm(), name


def test_the_decoder_is_the_rounded_masters_and_gains_do_not_decay(
    recipe: Recipe, data: PreparedData
) -> None:
    trainer = Trainer(recipe, data)
    trainer.step()
    tensors = trainer.tensors()
    for name, parameter in trainer.decoder.named_parameters():
        assert torch.equal(parameter, tensors[f"master.{name}"].bfloat16())
    matrices, gains = trainer.masters.optimizer.param_groups
    assert (matrices["weight_decay"], gains["weight_decay"]) == (0.1, 0.0)
    assert {p.ndim for p in gains["params"]} == {1}
    assert {p.ndim for p in matrices["params"]} == {2}


def test_a_loss_that_is_no_number_stops_and_keeps_the_checkpoint(
    recipe: Recipe, data: PreparedData, tmp_path: Path
) -> None:
    trainer = Trainer(recipe, data)

    def poison(step: int, report: object) -> None:
        if step == 8:
            for name, weight in trainer.masters.copies.items():
                if name.startswith("layers.1.mlp.experts.gate_proj."):
                    weight.data[0, 0] = float("nan")

    with pytest.raises(
        NumericalError,
        match=r"step 8: the loss is nan, and layer 1's feed-forward the first.*before is",
    ):
        run(trainer, tmp_path, poison)
    assert _saved_step(tmp_path / "checkpoint.safetensors") == 8
    saved = load_file(tmp_path / "checkpoint.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in saved.values())


def test_a_gradient_that_is_no_number_is_named(
    recipe: Recipe, data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finite loss whose gradient overflows: the one nearest to the loss is named."""
    honest = trainer_module.cross_entropy
    monkeypatch.setattr(
        trainer_module,
        "cross_entropy",
        lambda *args: (x := honest(*args)) + (x - x.detach()) * 1e38 * 1e38,
    )
    first = (
        r"step 0: the loss is 5\.\d+, and the gradient of norm\.weight the first .* there is "
        r"no checkpoint yet"
    )
    with pytest.raises(NumericalError, match=first):
        run(Trainer(recipe, data), tmp_path)


def test_a_full_disk_stops_and_keeps_the_checkpoint(
    recipe: Recipe, data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(100))

    def full(tensors: object, path: Path, **_: object) -> None:
        path.write_bytes(b"half a file")
        raise SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )

    trainer = Trainer(recipe, data)
    honest = trainer_module.save_file
    monkeypatch.setattr(
        trainer_module, "save_file", lambda *a, **k: (full if next(calls) == 5 else honest)(*a, **k)
    )
    with pytest.raises(
        StorageError,
        match=r"step 6: .*cannot be written: .*No space left.*checkpoint before is",
    ):
        run(trainer, tmp_path)
    assert _saved_step(tmp_path / "checkpoint.safetensors") == 5
    assert not list(tmp_path.glob(".checkpoint*"))
    run(Trainer(recipe, data), tmp_path)
    run(Trainer(recipe, data), tmp_path / "whole")
    whole, parts = (
        load_file(folder / "checkpoint.safetensors") for folder in (tmp_path / "whole", tmp_path)
    )
    assert _equal(whole, parts)


def test_a_disk_that_fills_under_the_metrics(
    recipe: Recipe, data: PreparedData, tmp_path: Path
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "metrics")

    with pytest.raises(
        StorageError, match=r"step 4: metrics cannot be written .No space left on device.; training"
    ):
        run(Trainer(recipe, data), tmp_path, on_line=full)
    assert _saved_step(tmp_path / "checkpoint.safetensors") == 3


def test_checkpoints_of_others_are_refused(
    recipe: Recipe, data: PreparedData, tmp_path: Path
) -> None:
    Trainer(recipe, data).save(tmp_path / "c.safetensors")
    other = Trainer(dataclasses.replace(recipe, seed=4), data)
    with pytest.raises(ConfigError, match="belongs to another recipe or corpus"):
        other.restore(tmp_path / "c.safetensors")
    whole = (tmp_path / "c.safetensors").read_bytes()
    (tmp_path / "c.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match="is no training checkpoint"):
        other.restore(tmp_path / "c.safetensors")
    with pytest.raises(WeightsError, match="is no training checkpoint"):
        other.restore(tmp_path / "missing.safetensors")


def test_a_step_reports_where_its_tokens_went(recipe: Recipe, data: PreparedData) -> None:
    report = Trainer(recipe, data).step()
    assert report.counts.shape == (2, 4)
    assert report.counts.sum(1).tolist() == [3 * 48 * 2] * 2


def test_tensorboard_reads_what_is_written(
    recipe: Recipe, data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = dataclasses.replace(
        recipe, training=dataclasses.replace(recipe.training, tensorboard=True)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(Trainer(recipe, data), tmp_path)
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    wanted = {"loss", "max_violation/layer_1", "heldout_bits_per_byte/all", "tokens_per_second"}
    assert wanted <= set(events.Tags()["scalars"])
    found = [(e.step, e.value) for e in events.Scalars("loss")]
    assert found == [(line["step"], pytest.approx(line["loss"])) for line in lines]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(
        ConfigError, match=r"TensorBoard is missing: pip install 'moebius\[tensorboard\]'"
    ):
        run(Trainer(recipe, data), tmp_path)


@pytest.mark.parametrize("steps", chosen([6, 50], lambda steps: steps == 6))
def test_many_steps_twice_are_the_same_bits(recipe: Recipe, data: PreparedData, steps: int) -> None:
    training = dataclasses.replace(
        recipe.training, steps=steps, accumulation=3, balance="global", learning_rate=0.003
    )
    routing = TrainingRouting(
        dropless=False, capacity_factor=1.0, jitter=0.01, second_policy="random"
    )
    recipe = dataclasses.replace(recipe, training=training, routing=routing)
    first, second = Trainer(recipe, data), Trainer(recipe, data)
    for _ in range(steps):
        a, b = first.step(), second.step()
        assert (a.loss, a.balance, a.z, a.grad_norm) == (b.loss, b.balance, b.z, b.grad_norm)
    assert _equal(first.tensors(), second.tensors())
    assert a.dropped.min() > 0 and a.dropped.max() < 1


@pytest.mark.parametrize("balance", ["sequence", "global"])
def test_accumulated_micro_batches_are_one_batch(
    recipe: Recipe, data: PreparedData, balance: str
) -> None:
    """The balance too: over the whole step's tokens, or over each sequence's, it does not see the
    cut."""
    reports, moments = [], []
    for accumulation in (1, 3):
        training = dataclasses.replace(
            recipe.training,
            accumulation=accumulation,
            balance=balance,
            dtype="float32",
            load_balance=1.0,
        )
        trainer = Trainer(dataclasses.replace(recipe, training=training), data)
        reports.append(trainer.step())
        moments.append(
            {name: x.clone() for name, x in trainer.tensors().items() if name.startswith("mean.")}
        )
    one, three = reports
    assert three.loss == pytest.approx(one.loss, rel=1e-5) and three.z == pytest.approx(
        one.z, rel=1e-5
    )
    assert three.balance == pytest.approx(one.balance, rel=1e-5)
    assert torch.equal(one.counts, three.counts)
    for name, mean in moments[0].items():
        torch.testing.assert_close(moments[1][name], mean, rtol=1e-3, atol=1e-6)


def test_biases_move_against_the_load(recipe: Recipe, data: PreparedData) -> None:
    dots1 = {
        "model_type": "dots1",
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "intermediate_size": 32,
    }
    model = {key: value for key, value in recipe.model.items() if key != "num_experts"} | dots1
    training = dataclasses.replace(recipe.training, bias_rate=0.1, load_balance=0.0)
    trainer = Trainer(dataclasses.replace(recipe, model=model, training=training), data)
    counts = trainer.step().counts
    for layer, load in enumerate(counts):
        bias = trainer.decoder.layers[layer].mlp.router.selection_bias
        assert bias.dtype == torch.float32
        torch.testing.assert_close(bias.data, 0.1 * torch.sign(load.mean() - load).float())


def test_the_smaller_initialisation(recipe: Recipe, data: PreparedData) -> None:
    """Switch section 2.4: sqrt(s / inputs), nothing beyond two of it; a cut normal is .8796 as wide
    as a whole one."""
    model = recipe.model | {"moe_intermediate_size": 64}
    training = dataclasses.replace(recipe.training, init_scale=0.1, router_init=3.0)
    tensors = Trainer(dataclasses.replace(recipe, model=model, training=training), data).tensors()
    for name, inputs, factor in (
        ("experts.gate_proj.0", 32, 1),
        ("experts.down_proj.1", 64, 1),
        ("router.weight", 32, 3),
    ):
        values, std = tensors[f"master.layers.0.mlp.{name}"], factor * (0.1 / inputs) ** 0.5
        assert values.abs().max() <= 2 * std
        assert values.std().item() == pytest.approx(0.8796 * std, rel=0.2 if factor == 3 else 0.06)
    assert tensors["master.embed_tokens.weight"].std().item() == pytest.approx(0.02, rel=0.05)


def test_a_whole_mixture_against_a_naive_loop_in_float64(
    recipe: Recipe, data: PreparedData
) -> None:
    """Logits, both losses and every gradient of a step: token by token, head by head, choice by
    choice."""
    training = dataclasses.replace(
        recipe.training, dtype="float32", rows_per_step=1, row_length=12, clip_norm=1e9
    )
    recipe = dataclasses.replace(
        recipe, training=training, model=recipe.model | {"initializer_range": 0.2}
    )
    trainer = Trainer(recipe, data)
    weights = {
        name: x.double().clone().requires_grad_()
        for name, x in trainer.decoder.state_dict().items()
    }
    batch = trainer._batches.batch(0)
    loss, balance, z = naive_losses(
        weights, batch.input_RL[0], batch.target_RL[0], batch.document_RL[0]
    )
    (loss + 0.01 * balance + 0.001 * z).backward()
    report = trainer.step()
    assert report.loss == pytest.approx(loss.item(), rel=1e-5)
    assert report.balance == pytest.approx(balance.item(), rel=1e-5)
    assert report.z == pytest.approx(z.item(), rel=1e-5)
    for name, weight in weights.items():
        mean = trainer.tensors()[f"mean.{name}"]
        expected = torch.zeros_like(weight) if weight.grad is None else weight.grad
        error = (mean.double() * 10 - expected).abs().max()
        assert error <= 1e-5 * max(expected.abs().max().item(), 0.01), name


def naive_losses(
    w: dict[str, torch.Tensor], ids: torch.Tensor, targets: torch.Tensor, documents: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """A qwen3_moe of the tests' recipe: 2 layers, 4 heads and 2 key heads of 8, 4 experts, top-2
    renormalised."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.square().mean() + 1e-6).sqrt() * w[f"{name}.weight"]

    def turned(x: torch.Tensor, position: int) -> torch.Tensor:
        angles = position * 10_000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
        a, b = x[:4], x[4:]
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()])

    stream, balance, z = [w["embed_tokens.weight"][i] for i in ids], 0.0, 0.0
    for layer in range(2):
        at = f"layers.{layer}."
        heads: dict[str, list[list[torch.Tensor]]] = {}
        for kind, count in (("q", 4), ("k", 2), ("v", 2)):
            rows = [
                w[f"{at}self_attn.{kind}_proj.weight"] @ norm(x, f"{at}input_layernorm")
                for x in stream
            ]
            heads[kind] = [list(row.view(count, 8)) for row in rows]
        for kind in "qk":
            normed = [[norm(h, f"{at}self_attn.{kind}_norm") for h in row] for row in heads[kind]]
            heads[kind] = [[turned(h, t) for h in row] for t, row in enumerate(normed)]
        for t in range(len(ids)):
            seen = [s for s in range(t + 1) if documents[s] == documents[t]]
            out = []
            for h in range(4):
                p = torch.stack(
                    [heads["q"][t][h] @ heads["k"][s][h // 2] / 8**0.5 for s in seen]
                ).softmax(0)
                out.append(sum(a * heads["v"][s][h // 2] for a, s in zip(p, seen, strict=True)))
            stream[t] = stream[t] + w[f"{at}self_attn.o_proj.weight"] @ torch.cat(out)
        load, mean = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
        for t, x in enumerate(norm(x, f"{at}post_attention_layernorm") for x in list(stream)):
            logits = w[f"{at}mlp.router.weight"] @ x
            p = logits.softmax(0)
            chosen = sorted(range(4), key=lambda e: -p[e].item())[:2]
            for e in chosen:
                gate, up, down = (
                    w[f"{at}mlp.experts.{kind}_proj.{e}"] for kind in ("gate", "up", "down")
                )
                hidden = (gate @ x) * torch.sigmoid(gate @ x) * (up @ x)
                stream[t] = stream[t] + p[e] / sum(p[c] for c in chosen) * (down @ hidden)
                load[e] += 1 / (2 * len(ids))
            mean = mean + p / len(ids)
            z = z + logits.logsumexp(0) ** 2 / len(ids) / 2
        balance = balance + 4 * (load * mean).sum() / 2
    logits = [w["embed_tokens.weight"] @ norm(x, "norm") for x in stream]
    loss = sum(v.logsumexp(0) - v[target] for v, target in zip(logits, targets, strict=True)) / len(
        ids
    )
    return loss, balance, z  # type: ignore[return-value]
