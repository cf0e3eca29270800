"""A training step: bfloat16 compute, float32 master weights, AdamW, exact resumption.

A step reads: micro-batches, losses, gradients, sum over ranks, clip, update. What it computes
depends on the recipe and on the step's number alone: random numbers too are drawn from a seed made
of recipe, step and micro-batch. Shape legend: R rows, L tokens in a row, T = R * L, D model, V
vocabulary, E experts, S layers with a router.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from moebius.moe.losses import chosen_counts, load_balance_loss, present, router_z_loss
from moebius.moe.router import Routing
from moebius.nn.packed import PackedPast
from moebius.train.data import Batch, Batches, PreparedData
from moebius.train.evaluate import routers, scores
from moebius.train.masters import SELECTION_BIAS, Masters, bytes_a_weight, squared_norm
from moebius.train.memory import told_of_memory
from moebius.train.ops import TrainingOps, cross_entropy
from moebius.train.ranks import Ranks
from moebius.train.recipe import Recipe
from moebius.train.sharing import Sharing
from moebius.train.start import Start, start
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
        self._parts = training.accumulation * self.ranks.count
        if training.rows_per_step % self._parts:
            rows = training.rows_per_step // training.accumulation
            raise ConfigError(
                f"the {rows} rows of a micro-batch (training.rows_per_step = "
                f"{training.rows_per_step}, accumulation = {training.accumulation}) cannot be "
                f"shared by {self.ranks.count} ranks evenly"
            )
        begin = start(recipe, data)
        self.config_json = begin.config_json
        self.sharing = Sharing(self.ranks, begin.config)
        bare = Decoder(begin.config, TrainingOps(), device="meta", ranks=self.sharing.experts)
        numbers = sum(each.numel() for each in bare.parameters())
        taken = numbers * bytes_a_weight(getattr(torch, training.dtype))
        advice = "train a smaller model, or use more ranks, which share the experts"
        with told_of_memory(self.device, "the model", taken, advice):
            self._fill(begin)
        self._batches = Batches(
            data, recipe.mixture, training.rows_per_step, training.row_length, recipe.seed
        )
        self.done = 0
        self.seconds = 0.0

    def _fill(self, begin: Start) -> None:
        """Make the decoder and its masters."""
        self.decoder = self._decoder(begin.config)
        self._routers = routers(self.decoder)
        self._num_experts = self._routers[0].config.num_experts if self._routers else 0
        copies = dict(self.decoder.named_parameters())
        for name, copy in copies.items():
            copy.requires_grad_(self._is_trained(name))
        weights = begin.weights(self.sharing.experts)
        training = self.recipe.training
        self.masters = Masters(copies, weights, training, self.device, self.sharing.is_own)

    def _decoder(self, config: ModelConfig) -> Decoder:
        routing = self.recipe.routing
        tuning = self.recipe.finetune
        drops = not routing.dropless or routing.second_policy != "all"
        if tuning is None:
            ops = TrainingOps(drops=drops, device=self.device)
        else:
            dropout = tuning.dropout, tuning.expert_dropout
            ops = TrainingOps(*dropout, drops=drops, device=self.device)
        dtype = getattr(torch, self.recipe.training.dtype)
        decoder = Decoder(config, ops, dtype, self.device, self.sharing.experts).train()
        ops.training = True
        for router in routers(decoder):
            router.limits = routing
        self.sharing.attach(decoder)
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
        """One update, which waits for the device once: to know that all is a number.

        Raises NumericalError naming step and layer, before anything changes, for a loss that is no
        number, and MemoryPlanError where a device has too little memory.
        """
        training = self.recipe.training
        rows = training.rows_per_step // self._parts
        doing = f"step {self.done}, of micro-batches of {rows} rows of {training.row_length} tokens"
        advice = (
            "raise training.accumulation, or lower training.rows_per_step or training.row_length"
        )
        with told_of_memory(self.device, doing, self.masters.nbytes, advice):
            return self._step()

    def _step(self) -> StepReport:
        training = self.recipe.training
        batch = self._batches.batch(self.done)
        loads = None
        if training.balance == "global" and training.accumulation > 1:
            loads = self._loads(batch)
        gradient = self.masters.gradient.zero_()
        sums = StepSums(len(self._routers), self._num_experts, self.device)
        for index in range(training.accumulation):
            self._micro_batch(batch, index, loads, sums)
        sums.square += squared_norm(self.masters.own_gradient)
        self.ranks.all_reduce(self.masters.shared_gradient, sums.vector)
        norm = (squared_norm(self.masters.shared_gradient) + sums.square).sqrt().float()
        rate = training.rate_at(self.done)
        report = sums.report(norm, rate)
        if not report.finite:
            raise NumericalError(self._what_is_no_number(batch, report.loss))
        gradient *= torch.clamp(training.clip_norm / (norm + 1e-6), max=1.0)
        self.masters.update(rate)
        self.masters.move_biases(sums.counts_SE, training.bias_rate)
        self.masters.round()
        self.done += 1
        return report

    def _forward(self, batch: Batch, index: int) -> _Computed:
        """This rank's rows of micro-batch `index`, hidden states as the logits' product takes them,
        and routings."""
        here = self.sharing.shard(batch.part(index, self.recipe.training.accumulation))
        part = here.to(self.device)
        seed = hashlib.sha256(f"{self.recipe.seed}/{self.done}/{index}".encode()).digest()
        torch.manual_seed(int.from_bytes(seed[:8], "little", signed=True))
        rows, length = part.input_RL.shape
        past = PackedPast(length, part.document_RL, here.document_RL)
        positions_T = torch.arange(length, device=self.device).repeat(rows)
        hidden_TD, routings = self.decoder(part.input_RL.reshape(-1), positions_T, past)
        divisor = self.decoder.config.logits_divisor
        if divisor != 1.0:
            hidden_TD = hidden_TD / divisor
        return _Computed(part, hidden_TD, present(routings))

    def _losses(
        self, batch: Batch, index: int, loads: Sequence[Tensor] | None
    ) -> tuple[Losses, list[Routing]]:
        """The losses of this rank's rows of a micro-batch, and their routings.

        loads: each layer's over the whole step; None for those of the micro-batch.
        """
        training = self.recipe.training
        part, hidden_TD, routings = self._forward(batch, index)
        decoder = self.decoder
        head = decoder.embed_tokens if decoder.lm_head is None else decoder.lm_head
        loss = cross_entropy(hidden_TD, head.weight, part.target_RL.reshape(-1))
        if not routings:
            return Losses(loss, torch.zeros_like(loss), torch.zeros_like(loss)), routings
        in_rows = training.balance == "sequence"
        if loads is None and not in_rows:
            loads = self._loads_of(routings)
        balance = load_balance_loss(
            routings,
            self._routers[0].config,
            sequences=len(part.input_RL) if in_rows else 1,
            counts=loads,
            first_only=training.first_choices,
        )
        return Losses(loss, balance, router_z_loss(routings)), routings

    def _micro_batch(
        self, batch: Batch, index: int, loads: Sequence[Tensor] | None, sums: StepSums
    ) -> None:
        """Add a micro-batch's gradients to the masters', and what it measured to `sums`."""
        training = self.recipe.training
        losses, routings = self._losses(batch, index, loads)
        total = losses.cross_entropy + training.load_balance * losses.balance
        total = total + training.z_loss * losses.z
        torch.autograd.backward(total / self._parts)
        self.masters.take_gradients()
        sums.add(losses, routings, self._parts)

    @torch.no_grad()
    def _loads(self, batch: Batch) -> list[Tensor]:
        """Each layer's load over the whole step (E,), by a forward pass that keeps nothing."""
        total_SE = torch.zeros(len(self._routers), self._num_experts, device=self.device)
        for index in range(self.recipe.training.accumulation):
            routings = self._forward(batch, index).routings
            if routings:
                total_SE += torch.stack(self._loads_of(routings))
        return list(total_SE)

    def _loads_of(self, routings: Sequence[Routing]) -> list[Tensor]:
        """Each layer's load over a micro-batch (E,), of whose tokens these routings are a share."""
        first_only = self.recipe.training.first_choices
        counts_SE = torch.stack([chosen_counts(r, first_only=first_only)[0] for r in routings])
        self.ranks.all_reduce(counts_SE)
        return list(counts_SE)

    @torch.no_grad()
    def _what_is_no_number(self, batch: Batch, loss: float) -> str:
        """One line on where the first NaN or infinity arises: forwards, else backwards."""
        parts = dict(_named_parts(self.decoder))
        broken: list[str] = []

        def look(module: torch.nn.Module, _: Any, output: Any) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            tensors = [x for x in outputs if isinstance(x, Tensor)]
            if module in parts and not all(bool(torch.isfinite(x).all()) for x in tensors):
                broken.append(parts[module])

        with register_module_forward_hook(look):
            for index in range(self.recipe.training.accumulation):
                self._losses(batch, index, None)
        broken += [f"the gradient of {name}" for name in self.masters.broken_gradients()]
        told = [name for name in self.ranks.all_gather_json(broken[0] if broken else None) if name]
        first = _earliest(told, list(parts.values())) if told else "the loss"
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
            sharing=self.sharing,
        )
        return {kind: score.bits_per_byte for kind, score in found.items()}

    def weights(self) -> dict[str, Tensor]:
        """All of the decoder's weights by name, at rank 0; elsewhere nothing. All ranks ask."""
        return self.sharing.gather(dict(self.decoder.state_dict()))

    def tensors(self) -> dict[str, Tensor]:
        """Masters and moments: with `done`, everything that the next step depends on.

        All of them at rank 0; elsewhere nothing. All ranks ask.
        """
        tensors = {}
        for kind, mine in self.masters.state().items():
            for name, tensor in self.sharing.gather(mine, self._is_saved(kind)).items():
                tensors[f"{kind}.{name}"] = tensor
        return tensors

    def _is_saved(self, kind: str) -> Callable[[str], bool]:
        return (lambda name: True) if kind == "master" else self._is_trained

    def save(self, path: Path, pending: Any = None) -> None:
        """Write the run's state to `path`: all of it, or what was there stays as it was.

        It is one safetensors file, the same whatever the number of ranks: tensors, and JSON in its
        header, `pending` included. Nothing is ever unpickled. All ranks ask, rank 0 writes. Raises
        StorageError when it cannot be written.
        """
        header = {
            "step": self.done,
            "fingerprint": self.fingerprint(),
            "seconds": self.seconds,
            "pending": pending,
        }
        tensors = self.tensors()
        metadata = {"moebius": json.dumps(header)}

        def write() -> None:
            try:
                write_file(path, lambda to: save_file(tensors, to, metadata=metadata), ours=anyone)
            except StorageError as error:
                raise StorageError(f"step {self.done}: {error}") from error

        self.ranks.lead(write)

    def restore(self, path: Path) -> Any:
        """Continue from what `save` wrote on any number of ranks, and return its `pending`.

        Raises: WeightsError, when the file is missing, truncated or no training state, or has
        tensors of another shape; ConfigError, when it belongs to another recipe or to other data.
        """
        mine = self.masters.state()
        saved = _read_checkpoint(path, mine)
        if saved.fingerprint != self.fingerprint():
            raise ConfigError(
                "the checkpoint belongs to another recipe or corpus; choose another --out or "
                "delete it"
            )
        for kind, tensors in mine.items():
            for name, wanted in tensors.items():
                found = saved.state[kind].get(name)
                shape = None if found is None else found.shape
                if shape != wanted.shape:
                    raise WeightsError(f"{path}: {kind}.{name} is {shape}, not {wanted.shape}")
        self.masters.restore(saved.state, saved.step)
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
    """A checkpoint file: `state` is that of Masters, as far as it was asked for."""

    step: int
    fingerprint: str
    seconds: float
    pending: Any
    state: Mapping[str, Mapping[str, Tensor]]


def _read_checkpoint(path: Path, wanted: Mapping[str, Iterable[str]]) -> _Saved:
    """wanted: names of tensors by their kind; no others are read."""
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["moebius"])
            there = set(file.keys())
            state = {
                kind: {
                    name: file.get_tensor(f"{kind}.{name}")
                    for name in names
                    if f"{kind}.{name}" in there
                }
                for kind, names in wanted.items()
            }
        return _Saved(
            header["step"], header["fingerprint"], header["seconds"], header["pending"], state
        )
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise WeightsError(f"{path} is no training checkpoint: {error}") from None


def _named_parts(decoder: Decoder) -> Iterator[tuple[torch.nn.Module, str]]:
    """Each layer's parts, and what to call them."""
    layers: Any = decoder.layers
    for number, layer in enumerate(layers):
        yield layer.self_attn, f"layer {number}'s attention"
        yield layer.mlp, f"layer {number}'s feed-forward"


def _earliest(broken: Sequence[str], parts: Sequence[str]) -> str:
    """Of what ranks found first, the first on the way forwards, else any gradient."""
    return min(broken, key=lambda name: parts.index(name) if name in parts else len(parts))
