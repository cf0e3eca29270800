"""A training step: bfloat16 compute, float32 master weights, AdamW, exact resumption.

A step reads: micro-batches, losses, gradients, sum over ranks, clip, update. What it computes
depends on the recipe and on the step's number alone: random numbers too are drawn from a seed made
of recipe, step and micro-batch. Shape legend: R rows, L tokens in a row, T = R * L, D model, V
vocabulary, E experts, S layers with a router.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook

from moebius.errors import ConfigError, NumericalError, StorageError, WeightsError
from moebius.files import anyone, write_file
from moebius.models.config import ModelConfig
from moebius.models.decoder import Decoder
from moebius.models.family import model_config
from moebius.models.store import open_checkpoint
from moebius.models.store.load import load_decoder
from moebius.moe.losses import chosen_counts, load_balance_loss, present, router_z_loss
from moebius.moe.router import Routing
from moebius.nn.packed import PackedPast
from moebius.train.data import Batch, Batches, PreparedData
from moebius.train.evaluate import routers, scores
from moebius.train.initial import init_weights
from moebius.train.masters import SELECTION_BIAS, Masters
from moebius.train.ops import TrainingOps, cross_entropy
from moebius.train.ranks import Ranks
from moebius.train.recipe import Recipe
from moebius.train.step import Losses, StepReport, StepSums
from moebius.train.tables import TokenizerRecipe


class _Computed(NamedTuple):
    """A micro-batch, its hidden states as the logits' product takes them, and its routings."""

    batch: Batch
    hidden_TD: Tensor
    routings: list[Routing]


class Trainer:
    """A decoder, the masters that it is a rounded copy of, and the steps that change both.

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
        training = recipe.training
        self.recipe = recipe
        self.data = data
        self.device = torch.device(device)
        self.ranks = ranks or Ranks()
        self._mine = self.ranks.share(training.accumulation)
        start = _fine_tuned(recipe, data) if recipe.model is None else _fresh(recipe, data)
        self.config_json = start.config_json
        self.decoder = self._decoder(start.config)
        self._routers = routers(self.decoder)
        self._num_experts = self._routers[0].config.num_experts if self._routers else 0
        copies = dict(self.decoder.named_parameters())
        for name, copy in copies.items():
            copy.requires_grad_(self._is_trained(name))
        self.masters = Masters(copies, start.weights, training, self.device)
        self._batches = Batches(
            data, recipe.mixture, training.rows_per_step, training.row_length, recipe.seed
        )
        self.done = 0
        self.seconds = 0.0

    def _decoder(self, config: ModelConfig) -> Decoder:
        routing = self.recipe.routing
        start = self.recipe.finetune
        drops = not routing.dropless or routing.second_policy != "all"
        if start is None:
            ops = TrainingOps(drops=drops)
        else:
            ops = TrainingOps(start.dropout, start.expert_dropout, drops=drops)
        dtype = getattr(torch, self.recipe.training.dtype)
        decoder = Decoder(config, ops, dtype, self.device).train()
        ops.training = True
        for router in routers(decoder):
            router.limits = routing
        return decoder

    def _is_trained(self, name: str) -> bool:
        if name.endswith(SELECTION_BIAS):
            return False
        part = self.recipe.finetune.train if self.recipe.finetune else "all"
        if part == "all":
            return True
        routed = False
        if ".experts." in name:
            layer = int(name.split(".")[1])
            routed = layer in self.decoder.routers
        return routed == (part == "experts")

    def step(self) -> StepReport:
        """One update.

        Raises NumericalError naming step and layer, before anything changes, for a loss that is no
        number.
        """
        training = self.recipe.training
        batch = self._batches.batch(self.done).to(self.device)
        counts = None
        if training.balance == "global" and training.accumulation > 1:
            counts = self._loads(batch)
        gradient = self.masters.gradient.zero_()
        sums = StepSums(len(self._routers), self._num_experts, self.device)
        for index in self._mine:
            self._micro_batch(batch, index, counts, sums)
        self.ranks.add_up(gradient, sums.vector)
        norm = torch.linalg.vector_norm(gradient)
        if not (torch.isfinite(sums.vector).all() and torch.isfinite(norm)):
            raise NumericalError(self._what_is_no_number(batch, sums.losses[0].item()))
        gradient *= torch.clamp(training.clip_norm / (norm + 1e-6), max=1.0)
        rate = training.rate_at(self.done)
        self.masters.update(rate)
        self.masters.move_biases(sums.counts_SE, training.bias_rate)
        self.masters.round()
        self.done += 1
        return sums.report(norm.item(), rate)

    def _forward(self, batch: Batch, index: int) -> _Computed:
        """Micro-batch `index` through the decoder, with random numbers of its own."""
        part = batch.part(index, self.recipe.training.accumulation)
        seed = hashlib.sha256(f"{self.recipe.seed}/{self.done}/{index}".encode()).digest()
        torch.manual_seed(int.from_bytes(seed[:8], "little", signed=True))
        rows, length = part.input_RL.shape
        past = PackedPast(length, part.document_RL)
        positions_T = torch.arange(length, device=self.device).repeat(rows)
        hidden_TD, routings = self.decoder(part.input_RL.reshape(-1), positions_T, past)
        divisor = self.decoder.config.logits_divisor
        if divisor != 1.0:
            hidden_TD = hidden_TD / divisor
        return _Computed(part, hidden_TD, present(routings))

    def _losses(
        self, batch: Batch, index: int, counts: list[Tensor] | None
    ) -> tuple[Losses, list[Routing]]:
        """The losses of a micro-batch, and its routings."""
        training = self.recipe.training
        part, hidden_TD, routings = self._forward(batch, index)
        decoder = self.decoder
        head = decoder.embed_tokens if decoder.lm_head is None else decoder.lm_head
        loss = cross_entropy(hidden_TD, head.weight, part.target_RL.reshape(-1))
        if not routings:
            return Losses(loss, torch.zeros_like(loss), torch.zeros_like(loss)), routings
        sequences = 1
        if training.balance == "sequence":
            sequences = len(part.input_RL)
        balance = load_balance_loss(
            routings,
            self._routers[0].config,
            sequences=sequences,
            counts=counts,
            first_only=training.first_choices,
        )
        return Losses(loss, balance, router_z_loss(routings)), routings

    def _micro_batch(
        self, batch: Batch, index: int, counts: list[Tensor] | None, sums: StepSums
    ) -> None:
        """Add a micro-batch's gradients to the masters', and what it measured to `sums`."""
        training = self.recipe.training
        losses, routings = self._losses(batch, index, counts)
        total = losses.cross_entropy + training.load_balance * losses.balance
        total = total + training.z_loss * losses.z
        torch.autograd.backward(total / training.accumulation)
        self.masters.take_gradients()
        sums.add(losses, routings, training.accumulation)

    @torch.no_grad()
    def _loads(self, batch: Batch) -> list[Tensor]:
        """Each layer's load over the whole step (E,), by a forward pass that keeps nothing."""
        first_only = self.recipe.training.first_choices
        total_SE = torch.zeros(len(self._routers), self._num_experts, device=self.device)
        for index in self._mine:
            routings = self._forward(batch, index).routings
            if routings:
                counts = [chosen_counts(r, first_only=first_only)[0] for r in routings]
                total_SE += torch.stack(counts)
        self.ranks.add_up(total_SE)
        return list(total_SE)

    @torch.no_grad()
    def _what_is_no_number(self, batch: Batch, loss: float) -> str:
        """One line on where the first NaN or infinity arises: forwards, else backwards."""
        broken: list[str] = []
        names = dict(_named_parts(self.decoder))

        def look(module: torch.nn.Module, _: Any, output: Any) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            tensors = [x for x in outputs if isinstance(x, Tensor)]
            if module in names and not all(bool(torch.isfinite(x).all()) for x in tensors):
                broken.append(names[module])

        with register_module_forward_hook(look):
            for index in self._mine:
                self._losses(batch, index, None)
        broken += [f"the gradient of {name}" for name in self.masters.broken_gradients()]
        first = broken[0] if broken else "the loss"
        return f"step {self.done}: the loss is {loss}, and {first} the first that is no number"

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
        """Masters and moments: with `done`, everything that the next step depends on."""
        return self.masters.tensors()

    def save(self, path: Path, pending: Any = None) -> None:
        """Write the run's state to `path`: all of it, or what was there stays as it was.

        It is one safetensors file: tensors, and JSON in its header, `pending` included. Nothing is
        ever unpickled. Raises StorageError when it cannot be written.
        """
        if self.ranks.rank:
            return
        header = {
            "step": self.done,
            "fingerprint": self.fingerprint(),
            "seconds": self.seconds,
            "pending": pending,
        }
        tensors = self.tensors()
        metadata = {"moebius": json.dumps(header)}
        try:
            write_file(path, lambda to: save_file(tensors, to, metadata=metadata), ours=anyone)
        except StorageError as error:
            raise StorageError(f"step {self.done}: {error}") from error

    def restore(self, path: Path) -> Any:
        """Continue from what `save` wrote, and return its `pending`.

        Raises: WeightsError, when the file is missing, truncated or no training state, or has
        tensors of another shape; ConfigError, when it belongs to another recipe or to other data.
        """
        saved = _read_checkpoint(path)
        if saved.fingerprint != self.fingerprint():
            raise ConfigError(
                "the checkpoint belongs to another recipe or corpus; choose another --out or "
                "delete it"
            )
        for name, wanted in self.tensors().items():
            shape = saved.tensors[name].shape if name in saved.tensors else None
            if shape != wanted.shape:
                raise WeightsError(f"{path}: {name} is {shape}, not {wanted.shape}")
        self.masters.restore(saved.tensors, saved.step)
        self.done = saved.step
        self.seconds = saved.seconds
        return saved.pending

    def fingerprint(self) -> str:
        """Of all that a run's numbers depend on, but for where files lie."""
        corpus = replace(self.recipe.corpus, files=dict.fromkeys(self.recipe.corpus.files, ()))
        recipe = replace(self.recipe, corpus=corpus, tokenizer=TokenizerRecipe())
        told = (recipe, self.data.facts["corpus_sha256"], self.data.tokenizer.to_str())
        return hashlib.sha256(repr(told).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class _Saved:
    """A checkpoint file."""

    step: int
    fingerprint: str
    seconds: float
    pending: Any
    tensors: dict[str, Tensor]


def _read_checkpoint(path: Path) -> _Saved:
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["moebius"])
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
        return _Saved(
            header["step"], header["fingerprint"], header["seconds"], header["pending"], tensors
        )
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise WeightsError(f"{path} is no training checkpoint: {error}") from None


def _named_parts(decoder: Decoder) -> Iterator[tuple[torch.nn.Module, str]]:
    """Each layer's parts, and what to call them."""
    layers: Any = decoder.layers
    for number, layer in enumerate(layers):
        yield layer.self_attn, f"layer {number}'s attention"
        yield layer.mlp, f"layer {number}'s feed-forward"


@dataclass(frozen=True, slots=True)
class _Start:
    """What training starts from: config.json, architecture, and float32 weights by name."""

    config_json: dict[str, Any]
    config: ModelConfig
    weights: dict[str, Tensor]


def _fresh(recipe: Recipe, data: PreparedData) -> _Start:
    """The recipe's own model with random weights."""
    training = recipe.training
    raw = recipe.config_json(data.vocab_size)
    config = model_config(raw)
    raw |= {"eos_token_id": data.end_of_text, "pad_token_id": data.end_of_text}
    if any(part.router and part.router.score == "softmax" for part in config.feed_forward):
        raw["router_aux_loss_coef"] = training.load_balance
    decoder = Decoder(config, TrainingOps())
    init_weights(
        decoder,
        torch.Generator().manual_seed(recipe.seed),
        raw["initializer_range"],
        training.init_scale,
        training.router_init,
    )
    return _Start(raw, config, _weights(decoder))


def _fine_tuned(recipe: Recipe, data: PreparedData) -> _Start:
    """The checkpoint that the recipe's finetune table names."""
    base = recipe.base()
    assert base is not None
    checkpoint = open_checkpoint(base)
    config = checkpoint.config
    raw = dict(checkpoint.config_json)
    # What is tied was decided by the file's tensors, and is said as it was loaded.
    if model_config(raw).tie_word_embeddings != config.tie_word_embeddings:
        raw["tie_word_embeddings"] = config.tie_word_embeddings
    if data.vocab_size > config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {data.vocab_size} entries, the checkpoint {config.vocab_size}; "
            "they do not belong together"
        )
    recipe.check_trainable(config)
    decoder = load_decoder(checkpoint, torch.float32, ops=TrainingOps(), mapped=False)
    return _Start(raw, config, _weights(decoder))


def _weights(decoder: Decoder) -> dict[str, Tensor]:
    return {name: weight.detach() for name, weight in decoder.named_parameters()}
