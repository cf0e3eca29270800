"""EngineClient: what a front may ask of an engine, wherever that engine runs.

Across this boundary go token ids, sampling parameters, cache salt and deadline (an
`EngineRequest`); back come token ids and log-probabilities (`StepOutput`). Prompts and answers
cross it as token ids, never as text. Every record can go to another process as a frame
(engine/wire.py). Nothing here imports torch.

A grammar crosses as its text: it is made and read in `text/`, a package below both sides, and
matched in the engine's process, where the logits are (engine/constraints.py).
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Protocol

from msgspec import Struct

from moebius.errors import MoebiusError
from moebius.parallel.traffic import Traffic
from moebius.request.engine_request import EngineRequest
from moebius.request.finish import FinishReason
from moebius.request.hashes import BlockHasher
from moebius.request.params import MOST_DRAFTS, ServingLimits


class TokenLogprob(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One position's log-probabilities (natural log, of the model's own softmax).

    rank is the token's place among all of the vocabulary, 1 for the most likely. top holds the k
    most likely (token id, log-probability) pairs, most likely first, ties to the lowest id; the
    token itself need not be in it.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


class StepOutput(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What one step brought one request. The one with a `finish_reason` is the last of its request.

    token_ids        drawn in this step, in order
    logprobs         one for each of token_ids, where the request asked for them
    prompt_logprobs  of prompt positions computed in this step, in order; position 0 has none, so
                     the first is of position 1
    num_cached_tokens   prompt tokens that came from the prefix cache
    error            why it ended, for every finish reason but STOP and LENGTH
    at               when it was computed, in seconds on the engine's clock, that of Request.arrival
    scheduled        when the request first had a place in a step, on the same clock; None while it
                     had none
    num_preemptions  how often it has lost its place so far
    waits            it has lost its place and waits in the queue again; any other output tells that
                     it does not, or not any more
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    num_cached_tokens: int = 0
    error: MoebiusError | None = None
    at: float = 0.0
    scheduled: float | None = None
    num_preemptions: int = 0
    waits: bool = False

    @property
    def for_client(self) -> bool:
        """Whether it has anything but where the request stands, which is for the front alone."""
        return bool(self.token_ids or self.prompt_logprobs or self.finish_reason is not None)


Deliver = Callable[[list[StepOutput]], None]
"""Where outputs go."""


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """Facts of a loaded engine that never change.

    fingerprint     names weights, configuration and kernels
    prefix_caching  whether requests share the blocks of a common prefix
    kv_dtype        what keys and values are held in
    kv_bytes        what all blocks take
    start_ids       what the answers of a decoder beside an encoder begin with; then a prompt is the
                    encoder's, and no answer continues it
    """

    limits: ServingLimits
    eos_ids: frozenset[int]
    block_size: int
    num_blocks: int
    fingerprint: str
    prefix_caching: bool = True
    kv_dtype: str = ""
    kv_bytes: int = 0
    start_ids: tuple[int, ...] = ()

    def hasher(self, key: bytes) -> BlockHasher | None:
        """What hashes prompts for an engine that was given `key`; None where it shares none."""
        if not self.prefix_caching:
            return None
        return BlockHasher(key, self.fingerprint.encode(), self.block_size)


# Upper bounds, in tokens, of the buckets that steps are counted in.
STEP_TOKENS_BOUNDS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


@dataclass(frozen=True, slots=True)
class DiskStats:
    """A KV cache on disk. Files are blocks of keys and values, and snapshots of states; all but the
    first two only grow.

    files, nbytes     what is there, of this engine's own
    reads, writes     files read and found good, and written
    misses            files that were gone, damaged or not to be read, when they were wanted
    dropped           files not written: the queue was full, there was no room, or their blocks were
                      used for something else meanwhile
    evictions         files removed for want of room
    late              requests that waited for their prefix in vain
    """

    files: int = 0
    nbytes: int = 0
    reads: int = 0
    misses: int = 0
    writes: int = 0
    dropped: int = 0
    evictions: int = 0
    late: int = 0
    bytes_read: int = 0
    bytes_written: int = 0

    def __add__(self, other: "DiskStats") -> "DiskStats":
        sums = (getattr(self, each.name) + getattr(other, each.name) for each in fields(self))
        return DiskStats(*sums)

    @property
    def counters(self) -> "DiskStats":
        """Without what is there."""
        return replace(self, files=0, nbytes=0)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot of the engine's gauges and counters. Counters only grow; tokens and requests are
    counts.

    step_tokens[i] counts the steps that computed at most STEP_TOKENS_BOUNDS[i] tokens, prompts' and
    drawn ones alike, and more than the bound before; the last entry counts those beyond all bounds.
    step_tokens_sum is of all steps. deferred of those that waited at the last step did so for a
    prefix that another was computing, not for room. most_running is how many may run at once. Of
    blocks, and of slots of recurrent states, cached ones have no user, and hold what a later
    sequence may start from. last_step and now are on the engine's monotonic clock, in seconds.
    drafts counts how often a request had draft_tokens verified, of which accepted_tokens were
    right; accepted_per_place[i] of these were the (i + 1)-th behind its last token. restarts counts
    engines that took the place of lost ones, and replayed the requests that were asked for again.
    traffic is what was exchanged with other ranks, disk the KV cache on disk.
    """

    running: int = 0
    waiting: int = 0
    deferred: int = 0
    used_blocks: int = 0
    total_blocks: int = 0
    most_running: int = 0
    cached_blocks: int = 0
    used_states: int = 0
    cached_states: int = 0
    total_states: int = 0
    steps: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    prompt_tokens_cached: int = 0
    generation_tokens: int = 0
    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    accepted_per_place: tuple[int, ...] = (0,) * MOST_DRAFTS
    step_tokens: tuple[int, ...] = (0,) * (len(STEP_TOKENS_BOUNDS) + 1)
    step_tokens_sum: int = 0
    last_step: float = 0.0
    now: float = 0.0
    ready: bool = False
    restarts: int = 0
    replayed: int = 0
    traffic: Traffic = field(default_factory=Traffic)
    disk: DiskStats = field(default_factory=DiskStats)

    @property
    def kv_cache_usage(self) -> float:
        """Share of blocks in use, 0 to 1."""
        return self.used_blocks / max(self.total_blocks, 1)


@dataclass(frozen=True, slots=True)
class LayerLoad:
    """How one layer's router spread the tokens that were computed in the window of its ExpertLoads.

    tokens           how many; the next three are NaN where there was none, as no figure can be had
                     of nothing
    max_over_mean    pairs of the busiest expert over the mean, 1 when even (moe/health.py has all
                     formulas)
    cv               the pairs' standard deviation over their mean, 0 when even
    router_entropy   mean over tokens of the entropy of the router's probabilities, in nats, 0 to ln
                     E
    dead             experts with less than a tenth of an even share
    pairs            (token, choice) pairs that each expert got in the window, total_pairs since the
                     start
    """

    layer: int
    top_k: int
    tokens: int
    max_over_mean: float
    cv: float
    router_entropy: float
    dead: tuple[int, ...]
    pairs: tuple[int, ...]
    total_pairs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ExpertLoads:
    """The layers that have a router, over the last `steps` steps; a dense model has none."""

    steps: int = 0
    layers: tuple[LayerLoad, ...] = ()


@dataclass(frozen=True, slots=True)
class LayerSpread:
    """Where one layer's experts are.

    held                 for each rank the experts that it holds
    imbalance            tokens of the busiest rank over the mean, by the loads of the last steps; 1
                         when even
    imbalance_linear     what it would be with experts placed in order, whatever their loads
    """

    layer: int
    held: tuple[tuple[int, ...], ...]
    imbalance: float
    imbalance_linear: float


@dataclass(frozen=True, slots=True)
class RankSpread:
    """computing: whether the rank takes part in the group's steps now. traffic: of all engines that
    were this rank."""

    rank: int
    computing: bool
    traffic: Traffic


@dataclass(frozen=True, slots=True)
class ExpertSpread:
    """How ranks share a model's experts.

    epoch   how often the group of ranks was formed
    moves   how often a layer's experts have moved since the start
    """

    epoch: int
    moves: int
    ranks: tuple[RankSpread, ...]
    layers: tuple[LayerSpread, ...]


class EngineClient(Protocol):
    """An engine, in this process or elsewhere. All methods are safe to call from any thread and,
    but for `advance` and `expert_loads`, never block long.

    Each request that `submit` takes gets exactly one StepOutput with a finish reason, its last. An
    engine that fails as a whole ends all of them with one EngineError, whose id the log has.
    """

    @property
    def info(self) -> EngineInfo: ...

    def start(self, deliver: Deliver) -> None:
        """Start the engine, once; `deliver` is called once a step, with that step's outputs, on the
        thread that made it, and with what ends without a step on the thread that ends it.

        Outputs that `deliver` raises over are lost, so their requests end with EngineError. Raises
        EngineError for a second start, and once the engine has stopped.
        """

    def submit(self, request: EngineRequest) -> None:
        """Hand over a request. Every outcome, refusals too, arrives as a StepOutput with a finish
        reason.

        Raises EngineError once the engine has stopped, RequestError for the id of an unfinished
        request.
        """

    def abort(self, request_id: str) -> None:
        """End a request between two steps; unknown or finished ids are no error. Its last
        StepOutput says ABORT."""

    def advance(self, wanted: Callable[[], bool]) -> bool:
        """Where the engine has no thread of its own: make a step on this one, unless `wanted` no
        longer holds when it is this thread's turn.

        False where nothing can be done here: the engine has no work, or runs elsewhere.
        """

    def stats(self) -> EngineStats:
        """Of an engine that is elsewhere, they may be some tenths of a second old."""

    def expert_loads(self) -> ExpertLoads:
        """An engine that is elsewhere is asked, for a second at most."""

    def close(self, timeout: float) -> None:
        """Stop the engine; what is unfinished ends with EngineError.

        It does so after `timeout` seconds, even where a step is not done by then. Closing again
        does nothing.
        """
