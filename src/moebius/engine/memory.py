"""The memory plan: what weights, KV cache and workspace take, computed before anything is
allocated.

It is made from the configuration and the safetensors headers alone (`moebius plan MODEL` prints it
without loading the model); the engine reserves what it says at start and nothing that grows later.
"""

from dataclasses import dataclass, replace

from moebius.engine.config import EngineConfig
from moebius.errors import MemoryPlanError, require
from moebius.models.config import ModelConfig
from moebius.ops.sampling import ROWS_AT_ONCE
from moebius.schedule.params import LIMITS

# Rows of logits that prompt log-probabilities are computed from at a time.
PROMPT_LOGIT_ROWS = 64
# Ids that sampling holds at a time (candidates, or those that penalties name), but for one row's
# that has more.
SAMPLED_IDS = 2**16
_FLOAT32 = 4
_INT64 = 8


@dataclass(frozen=True, slots=True)
class WeightBytes:
    """Bytes of weights read in place from the files (`mapped`) and of those converted into memory
    (`copied`).

    stored is the dtype that most of them have in the files.
    """

    mapped: int
    copied: int
    parameters: int
    stored: str = ""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Sizes in bytes, lengths in tokens.

    available is what was left when the plan was made, and `available_of` says of what: the machine,
    the control group that limits it, or a device. The default of max_model_len is lowered when one
    such sequence would not fit; `lowered_from` then says from what.
    """

    weights: WeightBytes
    block_size: int
    bytes_per_token: int
    num_blocks: int
    workspace: int
    available: int
    max_model_len: int
    max_num_seqs: int
    dtype: str
    device: str
    available_of: str = ""
    lowered_from: int | None = None

    @property
    def kv_cache(self) -> int:
        return self.num_blocks * self.block_size * self.bytes_per_token

    @property
    def kv_tokens(self) -> int:
        return self.num_blocks * self.block_size

    def sequences(self, length: int) -> int:
        """How many sequences of `length` tokens the cache holds at once (they may still take turns
        beyond that)."""
        return self.num_blocks // -(-length // self.block_size)

    def rows(self) -> list[tuple[str, str, str]]:
        """(what, how much, remark) for a table."""
        weights, blocks = self.weights, f"{self.num_blocks:,} blocks of {self.block_size} tokens"
        held = f"{human_bytes(weights.mapped)} mapped, {human_bytes(weights.copied)} copied"
        changed = ""
        if weights.stored not in ("", self.dtype):
            treated = "copied" if weights.copied > weights.mapped else "read in place"
            changed = f"; weights are {weights.stored} in the files, {treated}"
        context = (
            f"lowered from {self.lowered_from:,}: one sequence must fit"
            if self.lowered_from
            else "tokens"
        )
        lengths = sorted(
            {min(n, self.max_model_len) for n in (256, 1024, 4096, self.max_model_len)}
        )
        fits = [
            (f"sequences of {n:,}", f"{self.sequences(n):,}", "at once in the cache")
            for n in lengths
        ]
        return [
            (
                "weights",
                human_bytes(weights.mapped + weights.copied),
                f"{weights.parameters:,} parameters; {held}",
            ),
            (
                "KV cache",
                human_bytes(self.kv_cache),
                f"{blocks}, {self.bytes_per_token:,} B a token",
            ),
            (
                "workspace",
                human_bytes(self.workspace),
                "activations and logits of the largest step",
            ),
            ("available", human_bytes(self.available), f"left of {self.available_of}"),
            ("computed", self.dtype, f"on {self.device}{changed}"),
            ("context", f"{self.max_model_len:,}", context),
            *fits,
            ("running at most", f"{self.max_num_seqs:,}", "sequences in one step"),
        ]


def human_bytes(count: int) -> str:
    """1536 -> '1.5 KiB'."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def workspace_bytes(model: ModelConfig, engine: EngineConfig, itemsize: int) -> int:
    """Bound on what one step allocates: the activations of its widest moment, and its logits.

    T tokens pass each layer: hidden states, residual and norm; q, k, v and attention's output, in
    float32 inside the kernels; or (token, expert) rows of the feed-forward. Then L rows of logits.
    Beside them lie at first the parts that plain PyTorch puts them together from, then what
    sampling needs.
    """
    tokens = engine.max_num_batched_tokens
    hidden = 4 * model.hidden_size * _FLOAT32
    attention = 2 * max((mixer.activations for mixer in model.mixers), default=0) * _FLOAT32
    widest = max(
        (part.router.top_k if part.router else 1) * (3 * part.width + 2 * model.hidden_size)
        + 3 * part.shared_width
        for part in model.feed_forward
    )
    scores = max((mixer.scores for mixer in model.mixers), default=0) * tokens
    scores *= (engine.max_model_len or 0) * _FLOAT32
    logits = logit_rows(engine) * model.vocab_size * _FLOAT32
    beside = max(logits, sampling_bytes(model.vocab_size, engine.max_model_len or 0))
    activations = tokens * (hidden + max(attention, widest * max(itemsize, _FLOAT32)))
    return activations + min(scores, 2**28) + logits + beside


def logit_rows(engine: EngineConfig) -> int:
    """The most rows whose logits exist at a time."""
    return max(engine.max_num_seqs, PROMPT_LOGIT_ROWS)


def sampling_bytes(vocab_size: int, max_model_len: int) -> int:
    """Bound on what sampling allocates beside the logits, whatever a step's requests ask for.

    Rows that ask for many ids take turns (SAMPLED_IDS); one row asks for at most the vocabulary as
    candidates, or its context as tokens to penalise. An id takes up to 64 bytes: among candidates
    itself, twice while they are sorted, and its logit; under a penalty itself, where it is found,
    what changes, and the logit that it had. Beyond that plain PyTorch widens a few rows at a time,
    and a draw one row's candidates, to eight numbers of eight bytes an id.
    """
    ids = max(SAMPLED_IDS, vocab_size, max_model_len + LIMITS.logit_bias + LIMITS.stop_token_ids)
    return 64 * ids + ROWS_AT_ONCE * vocab_size * 8 * _INT64


def plan_memory(
    model: ModelConfig,
    engine: EngineConfig,
    weights: WeightBytes,
    *,
    dtype: str,
    device: str,
    bytes_per_token: int,
    available: int,
    available_of: str = "",
    recorded: int | None = None,
) -> MemoryPlan:
    """Divide `available` bytes. Raises MemoryPlanError or ConfigError with the numbers where the
    wish cannot be met.

    Mapped weights count like copied ones: each step reads them all, so pages that the kernel gave
    up for the cache's would come from the disk again and again.

    recorded: what the programs of a step take, where they are recorded; else it is estimated.

    The cache's default is the smaller of what max_num_seqs sequences of max_model_len can use and
    half of what is left after weights and workspace.
    """
    wanted, most = engine.max_model_len, model.context
    length = wanted or most
    require(
        length <= most,
        f"max_model_len = {wanted} is beyond the model's {most} positions; use at most {most}",
    )
    itemsize = _FLOAT32 if dtype == "float32" else 2
    if recorded is None:
        workspace = workspace_bytes(model, replace(engine, max_model_len=length), itemsize)
    else:
        workspace = recorded + sampling_bytes(model.vocab_size, length)
    left = available - weights.mapped - weights.copied - workspace
    of = f" (left of {available_of})" if available_of else ""
    require(
        left > 0,
        f"weights ({human_bytes(weights.mapped)} mapped, {human_bytes(weights.copied)} copied) and "
        f"workspace ({human_bytes(workspace)}) need more than the {human_bytes(available)} "
        f"available{of}; lower --max-num-batched-tokens, keep the checkpoint's --dtype, or free "
        "memory",
        MemoryPlanError,
    )
    block_bytes = engine.block_size * bytes_per_token
    budget = engine.kv_cache_memory_bytes
    if budget is None:
        useful = engine.max_num_seqs * -(-length // engine.block_size) * block_bytes
        budget = min(useful, left // 2)
    require(
        budget <= left,
        f"--kv-cache-memory-bytes {budget} ({human_bytes(budget)}) is more than the "
        f"{human_bytes(left)} that weights and workspace leave of {human_bytes(available)}{of}; "
        "lower it",
        MemoryPlanError,
    )
    plan = MemoryPlan(
        weights=weights,
        block_size=engine.block_size,
        bytes_per_token=bytes_per_token,
        num_blocks=budget // block_bytes,
        workspace=workspace,
        available=available,
        available_of=available_of,
        max_model_len=length,
        max_num_seqs=engine.max_num_seqs,
        dtype=dtype,
        device=device,
    )
    return _with_room_for_one(plan, shorter=wanted is None)


def _with_room_for_one(plan: MemoryPlan, *, shorter: bool) -> MemoryPlan:
    """The plan, whose context is made shorter, if it may be, until one sequence of that length fits
    into the cache."""
    if plan.kv_tokens >= plan.max_model_len:
        return plan
    needed = -(-plan.max_model_len // plan.block_size) * plan.block_size * plan.bytes_per_token
    require(
        shorter and plan.num_blocks >= 1,
        f"one sequence of {plan.max_model_len:,} tokens needs {human_bytes(needed)} of KV cache, "
        f"but it has {human_bytes(plan.kv_cache)} ({plan.kv_tokens:,} tokens); lower "
        f"--max-model-len or raise --kv-cache-memory-bytes to {needed}",
        MemoryPlanError,
    )
    return replace(plan, max_model_len=plan.kv_tokens, lowered_from=plan.max_model_len)
