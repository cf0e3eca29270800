"""The memory plan: what weights, KV cache and workspace take, before anything is allocated.

It is made from the configuration and the safetensors headers alone (`moebius plan MODEL` prints it
without loading the model); the engine reserves what it says at start and nothing that grows later.
"""

from dataclasses import dataclass, replace

from moebius.engine.cache_sizes import CacheSizes
from moebius.engine.config import EngineConfig
from moebius.engine.disk_memory import disk_memory
from moebius.engine.host_plan import HostPlan
from moebius.engine.plan_words import human_bytes
from moebius.engine.step_memory import StepMemory, grammar_bytes, graph_bytes, step_workspace
from moebius.engine.weight_bytes import WeightBytes
from moebius.errors import ConfigError, MemoryPlanError
from moebius.models.config import ModelConfig
from moebius.schedule.groups import CacheGroups, GroupSpec

_UNKNOWN = StepMemory()


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Sizes in bytes, lengths in tokens.

    A block holds `block_size` tokens of one group of layers; `num_slots` states are planned beside
    the blocks. `chunk` is the most tokens of a sequence that one step computes: a window holds them
    beside its own.

    host is what lies in the host's memory, beside a device with memory of its own that computes
    with it.

    grammars is what a large vocabulary takes in the host's memory once a request is held to one; 0
    where that is another memory than the cache's. disk is what a KV cache on disk takes of it.

    available is what was left when the plan was made, and `available_of` says of what: the machine,
    the control group that limits it, or a device. The default of max_model_len is lowered when one
    such sequence would not fit; `lowered_from` then says from what.
    """

    weights: WeightBytes
    block_size: int
    cache: CacheSizes
    num_blocks: int
    chunk: int
    workspace: int
    grammars: int
    disk: int
    available: int
    max_model_len: int
    max_num_seqs: int
    dtype: str
    device: str
    kv_dtype: str
    available_of: str = ""
    lowered_from: int | None = None
    num_slots: int = 0
    caching: bool = True
    capped: str = ""
    graphs: int = 0
    """Of the workspace, what captured steps take on a CUDA device."""
    host: HostPlan | None = None

    @property
    def groups(self) -> CacheGroups:
        """What the scheduler counts."""
        states = None
        if self.cache.state:
            states = self.cache.state_spec(
                self.num_slots,
                self.max_num_seqs,
                self.block_size,
                chunk=self.chunk,
                length=self.max_model_len,
            )
        blocks = tuple(map(GroupSpec, self.cache.windows))
        return CacheGroups(blocks, states)

    @property
    def left(self) -> int:
        """What there is for the cache."""
        beside = self.workspace + self.grammars + self.disk
        return self.available - self.weights.total - beside

    @property
    def kv_cache(self) -> int:
        return self.num_blocks * self.cache.block

    @property
    def states(self) -> int:
        """Recurrent states, and snapshots of them."""
        return self.num_slots * self.cache.state

    @property
    def bytes_per_token(self) -> int:
        """What a token adds to a sequence, until windows have passed it."""
        return len(self.cache.windows) * self.cache.block // self.block_size

    @property
    def kv_tokens(self) -> int:
        """Tokens that the blocks hold, in all layers."""
        return self.num_blocks // max(len(self.cache.windows), 1) * self.block_size

    def most_blocks(self, length: int) -> int:
        """Most blocks that a sequence of `length` tokens holds at a time: what admission asks."""
        return self.groups.most_blocks(length, self.chunk, self.block_size)

    def sequences(self, length: int) -> int:
        """How many sequences of `length` tokens the cache holds at once; more take turns."""
        blocks = self.most_blocks(length)
        most = self.num_blocks // blocks if blocks else self.max_num_seqs
        return min(most, self.num_slots // self.cache.own_slots) if self.cache.state else most

    def longest(self) -> int:
        """The longest sequence, up to max_model_len, of which the cache holds one."""
        low = 0
        high = -(-self.max_model_len // self.block_size)
        while low < high:
            middle = (low + high + 1) // 2
            if self.most_blocks(middle * self.block_size) <= self.num_blocks:
                low = middle
            else:
                high = middle - 1
        return min(low * self.block_size, self.max_model_len)

    def rows(self) -> list[tuple[str, str, str]]:
        """(what, how much, remark) for a table."""
        weights = self.weights
        held = f"{weights.parameters:,} parameters; {weights.parts}"
        if weights.moving:
            held += f", {human_bytes(weights.moving)} to move experts"
        changed = ""
        if weights.stored not in ("", self.dtype):
            treated = "copied" if weights.copied > weights.mapped else "read in place"
            changed = f"; weights are {weights.stored} in the files, {treated}"
        context = "tokens"
        if self.lowered_from:
            context = f"lowered from {self.lowered_from:,}: one sequence must fit"
        if self.capped:
            context += f"; {self.capped}"
        blocks = f"{self.num_blocks:,} blocks of {self.block_size} tokens"
        if self.kv_dtype != self.dtype:
            blocks += f" in {self.kv_dtype}"
        workspace = human_bytes(self.workspace)
        return [
            ("weights", human_bytes(weights.total), held),
            *self._cold_rows(),
            *self._near_rows(),
            (
                "KV cache",
                human_bytes(self.kv_cache),
                f"{blocks}, {self.bytes_per_token:,} B a token{self._windows()}",
            ),
            *self._state_rows(),
            *self._disk_rows(),
            ("workspace", workspace, "activations and logits of the largest step"),
            *self._grammar_rows(),
            ("available", human_bytes(self.available), f"left of {self.available_of}"),
            ("computed", self.dtype, f"on {self.device}{changed}"),
            ("context", f"{self.max_model_len:,}", context),
            *self._length_rows(),
            ("running at most", f"{self.max_num_seqs:,}", "sequences in one step"),
        ]

    def _disk_rows(self) -> list[tuple[str, str, str]]:
        if not self.disk:
            return []
        remark = "of memory: files on their way to and from the disk, and the names of all"
        return [("KV cache on disk", human_bytes(self.disk), remark)]

    def _grammar_rows(self) -> list[tuple[str, str, str]]:
        if not self.grammars:
            return []
        remark = "the vocabulary, once a request is held to a grammar"
        return [("grammars", human_bytes(self.grammars), remark)]

    def _cold_rows(self) -> list[tuple[str, str, str]]:
        disk = self.weights.on_disk
        if not disk:
            return []
        left = self.left - self.kv_cache - self.states
        fit = human_bytes(min(max(left, 0), disk))
        remark = f"experts, read as they are needed; {fit} of them fit beside all else"
        return [("on disk", human_bytes(disk), remark)]

    def _near_rows(self) -> list[tuple[str, str, str]]:
        weights = self.weights
        if not weights.near:
            return []
        remark = "of these are what every rank has: each of a host its own, where it computes"
        return [("repeated", human_bytes(weights.common), remark)]

    def _windows(self) -> str:
        windows = sorted({window for window in self.cache.windows if window is not None})
        if not windows:
            return ""
        named = " and ".join(f"{window:,}" for window in windows)
        return f"; freed behind windows of {named}"

    def _state_rows(self) -> list[tuple[str, str, str]]:
        rows = []
        states = self.groups.states
        if states is not None:
            size = human_bytes(states.num_slots * self.cache.state)
            remark = f"{states.num_slots:,} slots of {human_bytes(self.cache.state)}"
            if self.caching:
                uses = self.cache.snapshot_words(states, self.max_num_seqs, self.block_size)
                remark = f"{remark}: {uses}"
            rows.append(("states", size, remark))
        return rows

    def _length_rows(self) -> list[tuple[str, str, str]]:
        most = self.max_model_len
        return [
            (
                f"sequences of {n:,}",
                f"{self.sequences(n):,}",
                f"at once in the cache, {self.most_blocks(n):,} blocks each",
            )
            for n in sorted({min(n, most) for n in (256, 1024, 4096, most)})
        ]


def plan_memory(
    model: ModelConfig,
    engine: EngineConfig,
    weights: WeightBytes,
    *,
    dtype: str,
    device: str,
    cache: CacheSizes,
    kv_dtype: str | None = None,
    available: int,
    available_of: str = "",
    step: StepMemory = _UNKNOWN,
    ranks: int = 1,
    least: int = 0,
) -> MemoryPlan:
    """Divide `available` bytes.

    Raises MemoryPlanError or ConfigError, with the numbers, where the wish cannot be met.

    Mapped weights count like copied ones: each step reads them all, so pages that the kernel gave
    up for the cache's would come from the disk again and again. Of experts that may stay on disk
    one layer's count, and what is left keeps as many of the others as it can.

    ranks: how many share the experts; weights and all else are those of one of them.
    kv_dtype: what keys and values are held in; None: as they are computed.

    The cache's default is the smaller of what max_num_seqs sequences of max_model_len can use and
    half of what is left after weights and workspace, or `least`, as far as that goes.
    """
    wanted = engine.max_model_len
    length = _length(model, wanted)
    itemsize = 4 if dtype == "float32" else 2
    workspace = step_workspace(model, replace(engine, max_model_len=length), itemsize, ranks, step)
    graphs = graph_bytes(model, engine, step.pieces)
    plan = MemoryPlan(
        weights=weights,
        block_size=engine.block_size,
        cache=cache,
        num_blocks=0,
        chunk=engine.max_num_batched_tokens,
        workspace=workspace + graphs,
        grammars=grammar_bytes(model.vocab_size, device),
        disk=disk_memory(cache, engine) if device == "cpu" else 0,
        available=available,
        available_of=available_of,
        max_model_len=length,
        max_num_seqs=engine.max_num_seqs,
        dtype=dtype,
        device=device,
        kv_dtype=kv_dtype or dtype,
        num_slots=cache.useful_slots(engine.max_num_seqs, caching=engine.enable_prefix_caching),
        caching=engine.enable_prefix_caching,
        capped=model.capped,
        graphs=graphs,
    )
    budget = _cache_budget(plan, engine.kv_cache_memory_bytes, least)
    plan = _divided(plan, budget, whole=wanted is not None)
    return _with_room_for_one(plan, budget, shorter=wanted is None)


def with_cache_of(plan: MemoryPlan, budget: int) -> MemoryPlan:
    """The plan with a cache of so many bytes, and a shorter context where one sequence of it would
    not fit. Raises MemoryPlanError where none does."""
    return _with_room_for_one(_divided(plan, budget, whole=False), budget, shorter=True)


def _length(model: ModelConfig, wanted: int | None) -> int:
    """Of the longest sequence."""
    length = wanted or model.context
    if length > model.context:
        most = f"{model.context} positions; use at most {model.context}"
        if model.capped:
            most += f": {model.capped}"
        raise ConfigError(f"max_model_len = {wanted} is beyond the model's {most}")
    return length


def _divided(plan: MemoryPlan, budget: int, *, whole: bool) -> MemoryPlan:
    """The plan with its slots for states and its blocks, of the cache's bytes (CacheSizes).

    whole: there have to be blocks for one sequence of max_model_len.
    """
    cache = plan.cache
    needed = plan.most_blocks(plan.max_model_len if whole else 1) * cache.block
    slots = cache.affordable_slots(budget, plan.num_slots, needed)
    left = budget - slots * cache.state
    blocks = max(left, 0) // cache.block if cache.block else 0
    return replace(plan, num_slots=slots, num_blocks=blocks)


def _cache_budget(plan: MemoryPlan, wanted: int | None, least: int) -> int:
    """Bytes for the cache with its states: what is wanted, or the default, which is `least` or more
    where there is room.

    Raises MemoryPlanError where there is less.
    """
    weights = plan.weights
    available = human_bytes(plan.available)
    of = f" (left of {plan.available_of})" if plan.available_of else ""
    left = plan.left
    if left <= 0:
        disk = ""
        if plan.disk:
            disk = f", with what a KV cache on disk takes of it ({human_bytes(plan.disk)}),"
        raise MemoryPlanError(
            f"weights ({weights.parts}) and workspace ({human_bytes(plan.workspace)}){disk} need "
            f"more than the {available} available{of}; lower --max-num-batched-tokens, keep the "
            f"checkpoint's --dtype, {_remedies(plan)}or free memory"
        )
    if wanted is None:
        useful = plan.max_num_seqs * plan.most_blocks(plan.max_model_len) * plan.cache.block
        return min(useful + plan.states, max(left // 2, min(least, left)))
    if wanted > left:
        raise MemoryPlanError(
            f"--kv-cache-memory-bytes {wanted} ({human_bytes(wanted)}) is more than the "
            f"{human_bytes(left)} that weights and workspace leave of {available}{of}; lower it"
        )
    return wanted


def _remedies(plan: MemoryPlan) -> str:
    """What else would make weights take less; each with a comma behind it."""
    weights = plan.weights
    found = "use fewer --ranks (each has copies), " if weights.near else ""
    if plan.device != "cpu" and weights.routed:
        rest = weights.total - weights.routed
        found += (
            f"compute experts in the host's memory with --experts cpu ({human_bytes(rest)} of "
            "weights are left here) or some of them with --experts-on-gpu auto, "
        )
    if weights.experts and not weights.cold:
        found += "let experts stay on disk with --mmap-cold, "
    return found + ("lower --kv-cache-disk-bytes, " if plan.disk else "")


def _with_room_for_one(plan: MemoryPlan, budget: int, *, shorter: bool) -> MemoryPlan:
    """The plan, its context made shorter, if it may be, until one sequence fits into the cache."""
    if budget < plan.states:
        needed = plan.states + plan.most_blocks(1) * plan.cache.block
        raise MemoryPlanError(
            f"one sequence's recurrent states ({human_bytes(plan.cache.state)} a slot) need "
            f"{human_bytes(plan.states)}, but the cache has {human_bytes(budget)}; raise "
            f"--kv-cache-memory-bytes to {needed} or more, or free memory"
        )
    longest = plan.longest()
    if longest == plan.max_model_len:
        return plan
    if not (shorter and longest):
        needed = plan.most_blocks(plan.max_model_len) * plan.cache.block
        raise MemoryPlanError(
            f"one sequence of {plan.max_model_len:,} tokens needs {human_bytes(needed)} of KV "
            f"cache, but it has {human_bytes(plan.kv_cache)} ({plan.kv_tokens:,} tokens); lower "
            f"--max-model-len or {_more_cache(plan, needed + plan.states)}"
        )
    return replace(plan, max_model_len=longest, lowered_from=plan.max_model_len)


def _more_cache(plan: MemoryPlan, needed: int) -> str:
    """How a plan comes to so many bytes of cache."""
    raised = f"raise --kv-cache-memory-bytes to {needed}"
    if needed <= plan.left or plan.device == "cpu" or not plan.weights.routed:
        return raised
    short = human_bytes(needed - plan.left)
    return f"free {short} for more of it, with --experts cpu or fewer --experts-on-gpu"
