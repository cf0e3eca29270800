"""What an operator chooses about scheduling. Names are vLLM's where the meaning is the same."""

from dataclasses import Field, dataclass, fields
from types import NoneType
from typing import Annotated, Any, Literal, get_args

from moebius.errors import ConfigError, require, require_word

SchedulingPolicy = Literal["fcfs", "priority"]


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """None means: derived from the model and from the memory that is there."""

    max_model_len: Annotated[
        int | None, "Longest sequence, prompt and output together, in tokens."
    ] = None
    max_num_seqs: Annotated[int, "Most sequences in one step."] = 64
    max_num_batched_tokens: Annotated[int, "Token budget of one step."] = 2048
    block_size: Annotated[int, "Tokens in one block of the KV cache."] = 16
    enable_prefix_caching: Annotated[
        bool, "Share blocks between requests with a common prefix."
    ] = True
    enable_chunked_prefill: Annotated[
        bool, "Compute long prompts in pieces beside running decodes."
    ] = True
    max_queue_requests: Annotated[int, "Most requests that wait."] = 1024
    max_queue_tokens: Annotated[int, "Most tokens that wait."] = 4_194_304
    scheduling_policy: Annotated[
        SchedulingPolicy,
        "fcfs: in order of arrival. priority: requests may bring one; lower goes first.",
    ] = "fcfs"

    def __post_init__(self) -> None:
        require_word("scheduling_policy", self.scheduling_policy, SchedulingPolicy)
        for field in fields(self):
            _check_type(field, getattr(self, field.name))
        require(
            self.max_num_batched_tokens >= self.max_num_seqs,
            f"max_num_batched_tokens = {self.max_num_batched_tokens} is less than max_num_seqs = "
            f"{self.max_num_seqs}; each running sequence needs at least one token a step",
        )
        require(
            self.block_size <= 1024, f"block_size is {self.block_size}; it must be at most 1024"
        )


def _check_type(field: Field[Any], value: object) -> None:
    """ConfigError for a switch that is no bool, a count that is no integer of 1 or more, and a time
    that is no number; a word or a count is for the record itself to check."""
    kind = get_args(field.type)[0]  # what is Annotated
    kinds = get_args(kind) or (kind,)
    if bool in kinds:
        require(isinstance(value, bool), f"{field.name} is {value!r}; it must be True or False")
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if float in kinds and not number:
        raise ConfigError(f"{field.name} is {value!r}; it must be a number")
    if int not in kinds or str in kinds or (value is None and NoneType in kinds):
        return
    if not (number and isinstance(value, int)):
        raise ConfigError(f"{field.name} is {value!r}; it must be an integer")
    least = 0 if field.default == 0 else 1
    require(value >= least, f"{field.name} is {value}; it must be at least {least}")
