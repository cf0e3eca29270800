"""A training step: bfloat16 compute, float32 master weights, AdamW, and checkpoints that resume bit
for bit.

A step reads: micro-batches, losses, gradients, sum over ranks, clip, update. What it computes
depends on the recipe and on the step's number alone: random numbers too are drawn from a seed made
of recipe, step and micro-batch. Shape legend: R rows, L tokens in a row, T = R * L, D model, V
vocabulary, E experts, S layers with a router.
"""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook

from moebius.errors import ConfigError, NumericalError, StorageError, WeightsError, require
from moebius.files import anyone, write_file
from moebius.models.config import ModelConfig
from moebius.models.decoder import Decoder
from moebius.models.family import model_config
from moebius.models.store import open_checkpoint
from moebius.models.store.load import load_decoder
from moebius.moe.losses import (
    chosen_counts,
    load_balance_loss,
    present,
    router_z_loss,
    updated_bias,
)
from moebius.moe.router import Routing
from moebius.nn.packed import PackedPast
from moebius.train.architecture import check_trainable, config_json
from moebius.train.data import Batch, Batches, PreparedData
from moebius.train.evaluate import routers, scores
from moebius.train.ops import TrainingOps, cross_entropy
from moebius.train.ranks import Ranks
from moebius.train.recipe import Recipe, TokenizerRecipe

_BIAS = ".router.selection_bias"


class StepReport(NamedTuple):
    """What a step measured, before its update, over all its micro-batches. Losses in nats a token.

    counts (S, E): how many choices of each expert there were; dropped (S,): which share of them
    found no room.
    """

    loss: float
    balance: float
    z: float
    grad_norm: float
    learning_rate: float
    counts: Tensor
    dropped: Tensor


class Trainer:
    """Masters in float32, a decoder in bfloat16 that is a rounded copy of them, and the optimiser
    between the two.

    The decoder's weights are at every step what an export would hold. Raises ConfigError or
    WeightsError for a checkpoint to start from that does not fit.
    """

    def __init__(
        self,
        recipe: Recipe,
        data: PreparedData,
        *,
        device: torch.device | str = "cpu",
        ranks: Ranks | None = None,
    ) -> None:
        self.recipe, self.data, self.device = recipe, data, torch.device(device)
        self.ranks, training = ranks or Ranks(), recipe.training
        self._mine = self.ranks.share(training.accumulation)
        self.config_json, config, initial = _start(recipe, data)
        self.decoder = self._decoder(config)
        self._routers = routers(self.decoder)
        # How many layers have a router, and over how many experts.
        self._shape = (
            len(self._routers),
            self._routers[0].config.num_experts if self._routers else 0,
        )
        self._copies = dict(self.decoder.named_parameters())
        self._masters = {name: initial[name].to(self.device) for name in self._copies}
        for name, copy in self._copies.items():
            copy.requires_grad_(self._is_trained(name))
        trained = {
            name: self._masters[name] for name, copy in self._copies.items() if copy.requires_grad
        }
        self._gradient = torch.zeros(sum(m.numel() for m in trained.values()), device=self.device)
        parts = torch.split(self._gradient, [master.numel() for master in trained.values()])
        self._grads = {
            name: g.view_as(trained[name]) for name, g in zip(trained, parts, strict=True)
        }
        for name, grad in self._grads.items():
            trained[name].grad = grad
        decays = {True: training.weight_decay, False: 0.0}
        groups = [
            {
                "params": [m for m in trained.values() if (m.ndim >= 2) == matrices],
                "weight_decay": decay,
            }
            for matrices, decay in decays.items()
        ]
        betas = (training.beta1, training.beta2)
        self._optimizer = torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=0.0, betas=betas, fused=True
        )
        self._batches = Batches(
            data, recipe.mixture, training.rows_per_step, training.row_length, recipe.seed
        )
        self.done, self.seconds = 0, 0.0
        self._round()

    def _decoder(self, config: ModelConfig) -> Decoder:
        limits, start = self.recipe.routing, self.recipe.finetune
        rates = (start.dropout, start.expert_dropout) if start else (0.0, 0.0)
        drops = not limits.dropless or limits.second_policy != "all"
        ops = TrainingOps(*rates, drops=drops)
        decoder = Decoder(
            config, ops, getattr(torch, self.recipe.training.dtype), self.device
        ).train()
        ops.training = True
        for router in routers(decoder):
            router.limits = limits
        return decoder

    def _is_trained(self, name: str) -> bool:
        part = self.recipe.finetune.train if self.recipe.finetune else "all"
        expert = ".experts." in name and int(name.split(".")[1]) in self.decoder.routers
        return not name.endswith(_BIAS) and (part == "all" or expert == (part == "experts"))

    def step(self) -> StepReport:
        """One update. Raises: NumericalError naming step and layer, before anything changes, for a
        loss that is no number."""
        training = self.recipe.training
        batch = self._batches.batch(self.done).to(self.device)
        counts = (
            self._count(batch)
            if training.balance == "global" and training.accumulation > 1
            else None
        )
        self._gradient.zero_()
        sums = torch.zeros(
            3 + self._shape[0] * (self._shape[1] + 1), dtype=torch.float64, device=self.device
        )
        for index in self._mine:
            sums += self._micro_batch(batch, index, counts)
        self.ranks.add_up(self._gradient, sums)
        norm = torch.linalg.vector_norm(self._gradient)
        if not (torch.isfinite(sums).all() and torch.isfinite(norm)):
            raise NumericalError(self._what_is_no_number(batch, sums[0].item()))
        self._gradient *= torch.clamp(training.clip_norm / (norm + 1e-6), max=1.0)
        rate = training.rate_at(self.done)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        loss, balance, z = sums[:3].tolist()
        dropped_S, counts_SE = (
            sums[3 : 3 + self._shape[0]].cpu(),
            sums[3 + self._shape[0] :].view(self._shape),
        )
        self._move_biases(counts_SE)
        self._round()
        self.done += 1
        return StepReport(loss, balance, z, norm.item(), rate, counts_SE.cpu(), dropped_S)

    def _forward(self, batch: Batch, index: int) -> tuple[Batch, Tensor, list[Routing]]:
        """Micro-batch `index`, hidden states as the logits' product takes them, and routings."""
        part = batch.part(index, self.recipe.training.accumulation)
        seed = hashlib.sha256(f"{self.recipe.seed}/{self.done}/{index}".encode()).digest()
        torch.manual_seed(int.from_bytes(seed[:8], "little", signed=True))
        rows, length = part.input_RL.shape
        past = PackedPast(length, part.document_RL)
        positions_T = torch.arange(length, device=self.device).repeat(rows)
        hidden_TD, routings = self.decoder(part.input_RL.reshape(-1), positions_T, past)
        divisor = self.decoder.config.logits_divisor
        return part, hidden_TD if divisor == 1.0 else hidden_TD / divisor, present(routings)

    def _losses(
        self, batch: Batch, index: int, counts: list[Tensor] | None
    ) -> tuple[list[Tensor], list[Routing]]:
        """Cross-entropy, balance and z loss of a micro-batch, and its routings."""
        training, decoder = self.recipe.training, self.decoder
        part, hidden_TD, routings = self._forward(batch, index)
        head = decoder.embed_tokens if decoder.lm_head is None else decoder.lm_head
        losses = [cross_entropy(hidden_TD, head.weight, part.target_RL.reshape(-1))]
        if not routings:
            return [*losses, torch.zeros_like(losses[0]), torch.zeros_like(losses[0])], routings
        balance = load_balance_loss(
            routings,
            self._routers[0].config,
            sequences=len(part.input_RL) if training.balance == "sequence" else 1,
            counts=counts,
            first_only=training.first_choices,
        )
        return [*losses, balance, router_z_loss(routings)], routings

    def _micro_batch(self, batch: Batch, index: int, counts: list[Tensor] | None) -> Tensor:
        """Add a micro-batch's gradients; what it measured, as one vector: losses, dropped (S,),
        counts (S, E)."""
        training = self.recipe.training
        losses, routings = self._losses(batch, index, counts)
        loss, balance, z = losses
        total = loss + training.load_balance * balance + training.z_loss * z
        torch.autograd.backward(total / training.accumulation)
        for name, grad in self._grads.items():
            if (new := self._copies[name].grad) is not None:
                grad += new
            self._copies[name].grad = None
        lost = [
            torch.zeros_like(loss) if r.kept_TK is None else 1 - r.kept_TK.float().mean()
            for r in routings
        ]
        means = torch.stack([x.detach().float() for x in (*losses, *lost)]) / training.accumulation
        return torch.cat([means, *(chosen_counts(r).view(-1) for r in routings)]).double()

    @torch.no_grad()
    def _count(self, batch: Batch) -> list[Tensor]:
        """Each layer's load over the whole step (E,), by a forward pass that keeps nothing."""
        training = self.recipe.training
        total = torch.zeros(self._shape, device=self.device)
        for index in self._mine:
            *_, routings = self._forward(batch, index)
            counts = [
                chosen_counts(r, first_only=training.first_choices).view(-1) for r in routings
            ]
            total += torch.stack(counts) if counts else total
        self.ranks.add_up(total)
        return list(total)

    def _move_biases(self, counts_SE: Tensor) -> None:
        biases = [master for name, master in self._masters.items() if name.endswith(_BIAS)]
        for bias_E, counts_E in zip(biases, counts_SE, strict=False):
            bias_E.copy_(updated_bias(bias_E, counts_E, self.recipe.training.bias_rate))

    @torch.no_grad()
    def _what_is_no_number(self, batch: Batch, loss: float) -> str:
        """One line that says where the first NaN or infinity arises: forwards, else backwards from
        the loss."""
        bad: list[str] = []
        parts = {"self_attn": "attention", "mlp": "feed-forward"}
        layers = enumerate(self.decoder.layers)
        names = {
            getattr(layer, part): f"layer {i}'s {what}"
            for i, layer in layers
            for part, what in parts.items()
        }

        def look(module: torch.nn.Module, _: Any, out: Any) -> None:
            found = [
                x for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, Tensor)
            ]
            if module in names and not all(bool(torch.isfinite(x).all()) for x in found):
                bad.append(names[module])

        with register_module_forward_hook(look):
            for index in self._mine:
                self._losses(batch, index, None)
        bad += [
            f"the gradient of {n}"
            for n, grad in reversed(self._grads.items())
            if not grad.isfinite().all()
        ]
        return (
            f"step {self.done}: the loss is {loss}, and {bad[0] if bad else 'the loss'} the first "
            "that is no number"
        )

    def evaluate(
        self, max_rows: int | None = None, *, at_capacity: bool = False
    ) -> dict[str, float]:
        """Bits per byte of each kind of held-out text, and of `all`."""
        found = scores(
            self.decoder,
            self.data,
            self.recipe.training.row_length,
            max_rows,
            at_capacity=at_capacity,
        )
        return {kind: score.bits_per_byte for kind, score in found.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Masters and both moments by name: with `done`, everything that the next step depends
        on."""
        tensors = {f"master.{name}": master for name, master in self._masters.items()}
        for name in self._grads:
            slots = self._optimizer.state.get(self._masters[name]) or {}
            for key, slot in (("mean", "exp_avg"), ("square", "exp_avg_sq")):
                tensors[f"{key}.{name}"] = slots.get(slot, torch.zeros_like(self._masters[name]))
        return tensors

    def save(self, path: Path, pending: Any = None) -> None:
        """Write the run's state so that `path` holds either the old one or this one, whenever the
        machine stops.

        It is one safetensors file: tensors, and JSON in its header, `pending` included. Nothing is
        ever unpickled. Raises: StorageError, when it cannot be written; `path` is then what it was.
        """
        if self.ranks.rank:
            return
        header = {
            "step": self.done,
            "fingerprint": self.fingerprint(),
            "seconds": self.seconds,
            "pending": pending,
        }
        tensors, described = self.tensors(), {"moebius": json.dumps(header)}
        try:
            write_file(path, lambda to: save_file(tensors, to, metadata=described), ours=anyone)
        except StorageError as error:
            raise StorageError(f"step {self.done}: {error}") from error

    def restore(self, path: Path) -> Any:
        """Continue from what `save` wrote, and return its `pending`.

        Raises: WeightsError, when the file is missing, truncated or no training state, or has
        tensors of another shape; ConfigError, when it belongs to another recipe or to other data.
        """
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {})["moebius"])
                step, fingerprint, seconds, pending = (
                    header[k] for k in ("step", "fingerprint", "seconds", "pending")
                )
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise WeightsError(f"{path} is no training checkpoint: {error}") from None
        if fingerprint != self.fingerprint():
            raise ConfigError(
                "the checkpoint belongs to another recipe or corpus; choose another --out or "
                "delete it"
            )
        for name, wanted in self.tensors().items():
            have = tensors[name].shape if name in tensors else None
            require(
                have == wanted.shape, f"{path}: {name} is {have}, not {wanted.shape}", WeightsError
            )
        for name, master in self._masters.items():
            master.copy_(tensors[f"master.{name}"])
        for name in self._grads:
            self._optimizer.state[self._masters[name]] = {
                "step": torch.tensor(float(step), device=self.device),
                "exp_avg": tensors[f"mean.{name}"].to(self.device),
                "exp_avg_sq": tensors[f"square.{name}"].to(self.device),
            }
        self.done, self.seconds = step, seconds
        self._round()
        return pending

    def fingerprint(self) -> str:
        """Of all that a run's numbers depend on, but for where files lie."""
        corpus = replace(self.recipe.corpus, files=dict.fromkeys(self.recipe.corpus.files, ()))
        recipe = replace(self.recipe, corpus=corpus, tokenizer=TokenizerRecipe())
        told = (recipe, self.data.facts["corpus_sha256"], self.data.tokenizer.to_str())
        return hashlib.sha256(repr(told).encode()).hexdigest()

    @torch.no_grad()
    def _round(self) -> None:
        torch._foreach_copy_(
            list(self._copies.values()), [self._masters[name] for name in self._copies]
        )


def _start(
    recipe: Recipe, data: PreparedData
) -> tuple[dict[str, Any], ModelConfig, dict[str, Tensor]]:
    """config.json, architecture, and float32 weights by name: fresh ones, or those of the
    checkpoint to fine-tune."""
    if recipe.model is not None:
        training = recipe.training
        raw = config_json(recipe, data.vocab_size)
        config = model_config(raw)
        raw |= {"eos_token_id": data.end_of_text, "pad_token_id": data.end_of_text}
        if any(part.router and part.router.score == "softmax" for part in config.feed_forward):
            raw["router_aux_loss_coef"] = training.load_balance
        decoder, generator = (
            Decoder(config, TrainingOps()),
            torch.Generator().manual_seed(recipe.seed),
        )
        decoder.init_weights(
            generator, raw["initializer_range"], training.init_scale, training.router_init
        )
    else:
        base = recipe.base()
        assert base is not None
        checkpoint = open_checkpoint(base)
        raw, config = dict(checkpoint.config_json), checkpoint.config
        # What is tied was decided by the file's tensors, and is said as it was loaded.
        if model_config(raw).tie_word_embeddings != config.tie_word_embeddings:
            raw["tie_word_embeddings"] = config.tie_word_embeddings
        sizes = f"the tokenizer has {data.vocab_size} entries, the checkpoint {config.vocab_size}"
        require(data.vocab_size <= config.vocab_size, f"{sizes}; they do not belong together")
        check_trainable(config, recipe)
        decoder = load_decoder(checkpoint, torch.float32, ops=TrainingOps(), mapped=False)
    return raw, config, {name: p.detach() for name, p in decoder.named_parameters()}
