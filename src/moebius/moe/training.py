"""What routing does in training only."""

import math
from dataclasses import dataclass
from typing import Literal

from moebius.errors import ConfigError


@dataclass(frozen=True, slots=True)
class TrainingRouting:
    """What is done to a routing in training only. A model is served without any of it: a token's
    answer must not depend on the tokens beside it, which is what a capacity makes it do.

    dropless          no capacity: every expert takes whatever comes
    capacity_factor   an expert takes capacity_factor * K / E of a micro-batch's tokens, at least
                      min_capacity. GShard counts so; Mesh and ST-MoE leave out K (their 1.25 at
                      top-2 is 0.625 here)
    eval_capacity_factor   the same for measuring held-out text, beside measuring it dropless
    second_policy     of a token's choices after the first: `all` stay, those whose share of the
                      token's weights exceeds second_threshold (`threshold`), or each with
                      probability share / second_threshold (`random`; GShard's threshold is 0.5,
                      ST-MoE's 0.2, arXiv 2202.08906 appendix G)
    jitter            eps: the router's input is multiplied by uniform(1 - eps, 1 + eps), as Mesh
                      TensorFlow does
    """

    dropless: bool = True
    capacity_factor: float | None = None
    eval_capacity_factor: float | None = None
    min_capacity: int = 4
    second_policy: Literal["all", "threshold", "random"] = "all"
    second_threshold: float = 0.2
    jitter: float = 0.0

    def __post_init__(self) -> None:
        for name in ("capacity_factor", "eval_capacity_factor"):
            value = getattr(self, name)
            if value is None:
                continue
            if not 0 < value < math.inf:
                raise ConfigError(f"routing.{name} is {value}; it must be positive")
            if self.dropless:
                raise ConfigError(
                    f"routing.{name} is {value}, but a dropless router has no capacity; set "
                    "routing.dropless = false"
                )
        if not self.dropless and self.capacity_factor is None:
            raise ConfigError("routing.dropless is false; give capacity_factor")
        if self.min_capacity < 0:
            raise ConfigError(
                f"routing.min_capacity is {self.min_capacity}; it must not be negative"
            )
        if not 0 < self.second_threshold < 1:
            raise ConfigError(
                f"routing.second_threshold is {self.second_threshold}; it must lie between 0 and 1"
            )
        if not 0 <= self.jitter < 1:
            raise ConfigError(
                f"routing.jitter is {self.jitter}; it must be at least 0 and less than 1"
            )
