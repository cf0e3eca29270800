"""What an engine on a device takes of the host's memory: experts that lie there, and the rest."""

from dataclasses import dataclass

from moebius.engine.plan_words import human_bytes
from moebius.engine.weight_bytes import WeightBytes
from moebius.errors import MemoryPlanError
from moebius.models.config import ModelConfig
from moebius.moe.crossing import CrossingRows


@dataclass(frozen=True, slots=True)
class HostPlan:
    """Sizes in bytes.

    weights are experts', `rows` what their rows cross by and are computed in; grammars and disk are
    as in MemoryPlan. available is what was left of the host's memory, and `available_of` says of
    what.
    """

    weights: WeightBytes
    rows: int
    grammars: int
    disk: int
    available: int
    available_of: str

    @property
    def total(self) -> int:
        return self.weights.total + self.rows + self.grammars + self.disk

    def check(self) -> None:
        """Raises MemoryPlanError where the host has less."""
        if self.total <= self.available:
            return
        others = self.grammars + self.disk
        beside = f", and {human_bytes(others)} for grammars and a cache on disk" if others else ""
        cold = "" if self.weights.cold else "let experts stay on disk with --mmap-cold, "
        raise MemoryPlanError(
            f"experts in the host's memory ({self.weights.parts}), their rows "
            f"({human_bytes(self.rows)}){beside} need {human_bytes(self.total)}, more than the "
            f"{human_bytes(self.available)} available there (left of {self.available_of}); put "
            f"more of them on the device with --experts-on-gpu, {cold}lower "
            "--max-num-batched-tokens, or free memory"
        )

    def rows_of_table(self) -> list[tuple[str, str, str]]:
        """(what, how much, remark)."""
        held = f"{self.weights.parts}; {human_bytes(self.rows)} for their rows"
        left = f"left of {self.available_of}"
        rows = [
            ("in the host's memory", human_bytes(self.total), held),
            ("available there", human_bytes(self.available), left),
        ]
        if self.weights.on_disk:
            disk = human_bytes(self.weights.on_disk)
            rows.insert(1, ("on disk", disk, "of these experts, read as they are needed"))
        return rows


def rows_bytes(model: ModelConfig, most: CrossingRows) -> int:
    """What the rows of the host's experts take at most: buffers that they cross by, and for each
    choice its inner values, its answer, and that once more in the order in which it goes back."""
    width = max(part.width for part in model.feed_forward if part.router is not None)
    choices = most.tokens * most.top_k
    return most.nbytes + choices * (width + 2 * most.size) * most.dtype.itemsize
