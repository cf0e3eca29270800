"""What an operator chooses about an inspection."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from moebius.errors import ConfigError


@dataclass(frozen=True, slots=True)
class InspectConfig:
    """How much text `moebius inspect` runs, in which pieces, and what it works out costs for."""

    max_tokens: Annotated[int, "Most tokens that are run, chosen evenly from the text."] = 200_000
    row_length: Annotated[int, "Tokens in a row, which see each other."] = 512
    step_tokens: Annotated[int, "Tokens in a step; balance is also measured over each step."] = 2048
    capacity_factor: Annotated[
        Sequence[float], "Capacity factors to report the dropped share for."
    ] = (1, 1.25, 1.5, 2)
    ranks: Annotated[
        Sequence[int], "Numbers of ranks to place the experts on; default: 2, 4, ..."
    ] = ()
    quantization: Annotated[
        str | None, "Run the model in fewer bits, as `moebius serve --quantization` serves it."
    ] = None
    threads: Annotated[
        int | None, "Compute threads; default: one per core, as far as a CPU quota goes."
    ] = None

    def __post_init__(self) -> None:
        for name in ("max_tokens", "row_length", "step_tokens"):
            if getattr(self, name) < 2:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 2")
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"threads is {self.threads}; it must be at least 1")
        if not all(0 < factor < math.inf for factor in self.capacity_factor):
            raise ConfigError(
                f"capacity_factor is {list(self.capacity_factor)}; each must be a positive number"
            )

    def ranks_for(self, experts: int) -> list[int]:
        """The numbers of ranks to place so many experts on, in order.

        As given, or powers of two that divide the experts and leave each rank two of them.
        """
        wrong = [count for count in self.ranks if not 2 <= count <= experts]
        if wrong:
            raise ConfigError(
                f"ranks is {wrong}; {experts} experts can be spread over 2 to {experts} ranks"
            )
        if self.ranks:
            return sorted(set(self.ranks))
        powers = [2**i for i in range(1, 7)]
        return [count for count in powers if 2 * count <= experts and experts % count == 0]
