"""A checked checkpoint with everything decided that loading needs, and its plan as a table."""

from dataclasses import dataclass

import torch

from moebius import machine
from moebius.engine.drafting import why_not
from moebius.engine.host_experts import batch_invariant
from moebius.engine.memory import MemoryPlan
from moebius.engine.plan_words import human_bytes
from moebius.engine.step_memory import exchange_bytes
from moebius.engine.workspace import Workspace
from moebius.models.decoder import Decoder
from moebius.models.store import Checkpoint, PlannedWeight
from moebius.models.store.load import Loader
from moebius.models.store.tensors import NUMBER_BYTES
from moebius.ops import Ops
from moebius.quantize.cached import Quantized


@dataclass(frozen=True, slots=True)
class Prepared:
    """A checked checkpoint with everything decided that loading needs. Nothing is allocated yet."""

    checkpoint: Checkpoint
    ops: Ops
    device: torch.device
    dtype: torch.dtype
    kv_dtype: torch.dtype
    weights: list[PlannedWeight]
    plan: MemoryPlan
    threads: int
    workspace: Workspace
    decoder: Decoder
    """Without memory; the first engine that is made of this fills it."""
    loader: Loader
    quantized: Quantized | None = None
    """What `checkpoint` is made by, where it is to have fewer bits."""
    speculative: str = "none"
    placed: str = ""
    """Which experts are on the device, where others are not."""
    proven: bool = False
    """One answer in any company was seen on the device itself."""

    @property
    def batch_invariant(self) -> bool:
        """Promise P1: told by the operations that this model uses, the host's among them, or
        seen."""
        host = self.decoder.host
        there = host is None or batch_invariant(host)
        return there and (self.proven or self.workspace.batch_invariant(self.ops))

    def rows(self) -> list[tuple[str, str, str]]:
        """The plan as a table: (what, how much, remark)."""
        weights, *rest = self.plan.rows()
        return [
            weights,
            *self._format_rows(),
            *self._quantization_rows(),
            *self._host_rows(),
            *rest,
            *self._drafting_rows(),
            *self._rank_rows(),
            ("threads", str(self.threads), f"{machine.processors():g} processors may be used"),
        ]

    def _format_rows(self) -> list[tuple[str, str, str]]:
        formats = self.checkpoint.formats
        if set(formats) <= NUMBER_BYTES.keys():
            return []
        parts = (f"{human_bytes(nbytes)} {name}" for name, nbytes in formats.items())
        return [("formats", "", ", ".join(parts))]

    def _quantization_rows(self) -> list[tuple[str, str, str]]:
        if self.quantized is None:
            return []
        before = human_bytes(sum(self.quantized.original.formats.values()))
        after = human_bytes(sum(self.quantized.checkpoint.formats.values()))
        remark = f"{before} become {after}; kept in {self.quantized.file.parent}"
        return [("quantization", self.quantized.recipe.name, remark)]

    def _host_rows(self) -> list[tuple[str, str, str]]:
        host = self.decoder.host
        if host is None or self.plan.host is None:
            return []
        here = {len(host.on_device(layer)) for layer in host.experts}
        there = {len(host.on_host(layer)) for layer in host.experts}
        of = _range(set(host.experts.values()))
        remark = (
            f"of {of} a layer on {self.device.type}, {self.placed}; {_range(there)} in the host's "
            f"memory, computed there by {host.ops.name}: whose bits an expert has is a matter of "
            "its place alone"
        )
        return [("experts", _range(here), remark), *self.plan.host.rows_of_table()]

    def _drafting_rows(self) -> list[tuple[str, str, str]]:
        if self.speculative == "none":
            return []
        reason = why_not(self.checkpoint.config, self.plan.groups)
        return [("drafts", "off" if reason else self.speculative, reason or "where they pay")]

    def _rank_rows(self) -> list[tuple[str, str, str]]:
        ranks = self.decoder.ranks
        if ranks is None:
            return []
        count = ranks.placement.ranks
        held = {len(ranks.held(layer) or ()) for layer in ranks.placement.layers}
        of = set(ranks.placement.experts.values())
        exchanged = exchange_bytes(self.decoder.config, ranks.tokens, count, self.dtype.itemsize)
        experts = f"{_range(held)} of {_range(of)} experts a layer"
        traded = f"{human_bytes(exchanged)} exchanged in the largest step at most"
        return [("rank", f"{ranks.rank} of {count}", f"{experts}; {traded}")]


def _range(numbers: set[int]) -> str:
    low = min(numbers)
    high = max(numbers)
    return str(low) if low == high else f"{low} to {high}"
