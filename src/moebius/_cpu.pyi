"""The kernels of csrc, as csrc/bindings.cpp shows them to ops/cpu. Arrays are addresses, 0 for
none."""

from collections.abc import Sequence

def available() -> list[str]: ...
def formats() -> list[str]: ...
def reads(dtype: int, format: int) -> bool: ...

class Matrix:
    def __init__(
        self,
        *,
        format: int,
        rows: int,
        columns: int,
        data: int,
        scales: int = 0,
        block_rows: int = 1,
        block_columns: int = 1,
        scale_type: int = 0,
        zeros: int = 0,
        copy_zeros: bool = False,
        biases: int = 0,
        order: int = 0,
    ) -> None: ...

class _Call:
    """An operation's arguments by name, whose fields csrc/ops.h describes."""

    def run(self, ops: Ops, rows: int) -> None: ...
    def note(self, ops: Ops, program: Program, count: int, factor: int) -> None: ...

class Embed(_Call):
    def __init__(
        self, *, dtype: int, table: Matrix, multiplier: float, ids: int, out: int
    ) -> None: ...

class LinearCall(_Call):
    def __init__(self, *, layers: Linear, x: int, wide: bool, out: int) -> None: ...

class ExpertsCall(_Call):
    def __init__(
        self,
        *,
        experts: Experts,
        x: int,
        weights: int,
        ids: int,
        top_k: int,
        inner: int,
        outer: int,
        out: int,
    ) -> None: ...

class ExpertRows(_Call):
    def __init__(
        self, *, experts: Experts, x: int, ids: int, top_k: int, inner: int, out: int
    ) -> None: ...

class Combine(_Call):
    def __init__(
        self, *, dtype: int, x: int, weights: int, top_k: int, size: int, out: int
    ) -> None: ...

class AddGated(_Call):
    def __init__(self, *, dtype: int, a: int, b: int, gate: int, size: int, out: int) -> None: ...

class RmsNorm(_Call):
    def __init__(
        self,
        *,
        dtype: int,
        x: int,
        update: int,
        multiplier: float,
        weight: int,
        weight_dtype: int,
        size: int,
        stride: int,
        eps: float,
        sum: int,
        out: int,
        less_mean: bool = False,
        scale: int = 0,
    ) -> None: ...

class Clip(_Call):
    def __init__(self, *, dtype: int, x: int, size: int, limit: float, out: int) -> None: ...

class Divide(_Call):
    def __init__(self, *, x: int, size: int, divisor: float, out: int) -> None: ...

class Softcap(_Call):
    def __init__(self, *, x: int, size: int, cap: float, out: int) -> None: ...

class Rotation(_Call):
    def __init__(
        self, *, positions: int, inverse: int, half: int, factor: float, cos: int, sin: int
    ) -> None: ...

class RotateAndStore(_Call):
    def __init__(
        self,
        *,
        dtype: int,
        shape: CacheShape,
        blocks: int,
        qkv: int,
        q_heads: int,
        gated: bool,
        cos: int,
        sin: int,
        half: int,
        interleaved: bool,
        q_norm: int,
        k_norm: int,
        norm_dtype: int,
        eps: float,
        slots: int,
        cache: int,
        key_offset: int,
        q_out: int,
        turned_first: bool,
        keys_as_values: bool = False,
        normed_values: bool = False,
        queries_alone: bool = False,
    ) -> None: ...

class Attention(_Call):
    def __init__(
        self,
        *,
        dtype: int,
        shape: CacheShape,
        blocks: int,
        step: StepAttention,
        cache: int,
        key_offset: int,
        q: int,
        q_heads: int,
        scale: float,
        softcap: float,
        sinks: int,
        out: int,
        bias: int = 0,
        reach: int = 0,
    ) -> None: ...

class CausalConv(_Call):
    def __init__(
        self,
        *,
        dtype: int,
        step: StepStates,
        x: int,
        stride: int,
        channels: int,
        taps: int,
        weight: int,
        weight_dtype: int,
        bias: int,
        bias_dtype: int,
        state: int,
        slots: int,
        silu: bool,
        out: int,
    ) -> None: ...

class GatedDelta(_Call):
    def __init__(
        self,
        *,
        dtype: int,
        step: StepStates,
        key_heads: int,
        value_heads: int,
        key_dim: int,
        value_dim: int,
        tiled: bool,
        qkv: int,
        gates: int,
        gates_stride: int,
        decay: int,
        dt_bias: int,
        state: int,
        slots: int,
        out: int,
        channels: int = 0,
        channels_stride: int = 0,
        lower: float = 0.0,
        rounded: bool = False,
    ) -> None: ...

class SelectiveScan(_Call):
    def __init__(
        self,
        *,
        dtype: int,
        step: StepStates,
        heads: int,
        head_dim: int,
        state_dim: int,
        groups: int,
        xbc: int,
        dt: int,
        dt_stride: int,
        decay: int,
        dt_bias: int,
        skip: int,
        state: int,
        slots: int,
        out: int,
    ) -> None: ...

class GroupedNorm(_Call):
    def __init__(
        self,
        *,
        dtype: int,
        x: int,
        gates: int,
        gates_stride: int,
        weight: int,
        weight_dtype: int,
        eps: float,
        groups: int,
        size: int,
        out: int,
    ) -> None: ...

class GatedNorm(_Call):
    def __init__(
        self,
        *,
        dtype: int,
        x: int,
        gates: int,
        gates_stride: int,
        weight: int,
        weight_dtype: int,
        eps: float,
        heads: int,
        size: int,
        function: int,
        out: int,
    ) -> None: ...

class GateHeads(_Call):
    def __init__(
        self,
        *,
        dtype: int,
        x: int,
        heads: int,
        size: int,
        gates: int,
        gates_stride: int,
        head_stride: int,
        single: bool,
        function: int,
        out: int,
    ) -> None: ...

class HeadProducts(_Call):
    def __init__(self, *, heads: HeadMatrices, x: int, kept: int, out: int) -> None: ...

class StoreLatent(_Call):
    def __init__(
        self,
        *,
        dtype: int,
        shape: CacheShape,
        blocks: int,
        q: int,
        q_heads: int,
        latent: int,
        norm: int,
        norm_dtype: int,
        eps: float,
        cos: int,
        sin: int,
        half: int,
        interleaved: bool,
        slots: int,
        cache: int,
        positions: int,
        beta: float,
        original: int,
    ) -> None: ...

class Route(_Call):
    def __init__(
        self,
        *,
        settings: RouterSettings,
        logits: int,
        bias: int,
        weights: int,
        ids: int,
        pairs: int,
        sums: int,
        expert_scale: int = 0,
    ) -> None: ...

class Linear:
    def __init__(self, *, dtype: int, weights: Sequence[Matrix], biases: Sequence[int]) -> None: ...

class HeadMatrices:
    def __init__(self, *, dtype: int, weights: Sequence[Matrix]) -> None: ...

class Experts:
    def __init__(
        self,
        *,
        dtype: int,
        hidden: int,
        width: int,
        activation: int,
        gate: Sequence[Matrix],
        up: Sequence[Matrix],
        down: Sequence[Matrix],
        gate_bias: Sequence[int],
        up_bias: Sequence[int],
        down_bias: Sequence[int],
        on_disk: bool = False,
        interleaved: bool = False,
        alpha: float = 0.0,
        limit: float = 0.0,
    ) -> None: ...
    def assign(self, other: Experts) -> None: ...

class WithinCapacity(_Call):
    def __init__(
        self,
        *,
        step: StepStates,
        weights: int,
        ids: int,
        top_k: int,
        experts: int,
        capacity: int,
        out: int,
    ) -> None: ...

class StepAttention:
    def __init__(self, *, window: int, block_size: int) -> None: ...
    def set(
        self,
        *,
        query_start: int,
        seq_lens: int,
        block_table: int,
        batch: int,
        width: int,
        first_keys: int = 0,
        whole: bool = False,
    ) -> None: ...

class StepStates:
    def __init__(self) -> None: ...
    def set(self, *, query_start: int, slots: int, batch: int, kept: bool) -> None: ...

class CacheShape:
    def __init__(
        self,
        *,
        block_size: int,
        kv_heads: int,
        key_dim: int,
        value_dim: int,
        type: int,
        shared: bool = False,
        stride: int = 0,
    ) -> None: ...
    @property
    def block_bytes(self) -> int: ...
    @property
    def stride(self) -> int: ...

class RouterSettings:
    def __init__(
        self,
        *,
        num_experts: int,
        top_k: int,
        score: int,
        weight: int,
        num_groups: int,
        groups_kept: int,
        group_top2: int,
        group_fill: float,
        renorm_eps: float,
        scale: float,
        softcap: float,
        renorm_least: float,
    ) -> None: ...

class Program:
    """Calls, and where they read the columns of int64 that each run brings."""

    def __init__(self, *, columns: Sequence[int], counts: Sequence[int]) -> None: ...
    def __len__(self) -> int: ...
    def load(self, columns: Sequence[int], counts: Sequence[int]) -> None: ...
    def run(self, first: int, stop: int, counts: Sequence[int]) -> None: ...
    def __call__(self, columns: Sequence[int], counts: Sequence[int]) -> None:
        """Load, and run all calls."""

class Logits:
    def __init__(self, values: int, count: int, vocab: int) -> None: ...
    def allow(self, row: int, ids: int, words: int) -> None: ...

class Shaping:
    def __init__(
        self,
        biased: Sequence[int],
        bias: Sequence[float],
        seen: Sequence[int],
        drawn: Sequence[int],
        repetition: float,
        presence: float,
        frequency: float,
        banned: Sequence[int],
    ) -> None: ...

class Shaped:
    def restore(self) -> None: ...

class Ops:
    def __init__(
        self, isa: str, threads: int, float_activations: bool = False, ordered: bool = False
    ) -> None: ...
    @property
    def name(self) -> str: ...
    @property
    def threads(self) -> int: ...
    @property
    def scratch_bytes(self) -> int: ...
    def most_scratch_bytes(self, *, widest: int, shape: CacheShape, context: int) -> int: ...
    def argmax(self, logits: Logits, rows: Sequence[int]) -> list[int]: ...
    def log_softmax_top_k(
        self,
        logits: Logits,
        rows: Sequence[int],
        counts: Sequence[int],
        temperatures: Sequence[float],
        log_sums: int,
        values: int,
        ids: int,
    ) -> None: ...
    def draw(
        self,
        logits: Logits,
        rows: Sequence[int],
        temperatures: Sequence[float],
        uniforms: Sequence[float],
    ) -> list[int]: ...
    def ranks(self, logits: Logits, rows: Sequence[int], token_ids: Sequence[int]) -> list[int]: ...
    def shape(self, logits: Logits, rows: Sequence[int], shapings: Sequence[Shaping]) -> Shaped: ...

class PeersLost(Exception):
    """Its arguments: the ranks, and `late`, `gone` (given up), `left` or `out of step`."""

class ExchangeLayout:
    """What a segment is for; csrc/exchange.h describes it and all that follows."""

    def __init__(
        self,
        *,
        ranks: int,
        tokens: int,
        top_k: int,
        gathered: int,
        width: int,
        row_bytes: int,
        group: str,
        epoch: int,
    ) -> None: ...
    @property
    def nbytes(self) -> int: ...
    def write(self, segment: int, cores: int) -> None: ...
    def check(self, segment: int, nbytes: int) -> None: ...

def exchange_give_up(segment: int, ranks: Sequence[int]) -> None: ...

class ExchangeTraffic:
    calls: int
    bytes_out: int
    bytes_in: int
    seconds_waited: float

class _Exchange:
    """What both exchanges do; at run time neither has a base."""

    def agree(self, values: Sequence[int]) -> list[list[int]]: ...
    def dispatch(
        self,
        x: int,
        ids: int,
        tokens: int,
        owners: int,
        splits: int,
        experts: int,
        rows: int,
        ids_out: int,
    ) -> int: ...
    def combine(self, outputs: int, back: int) -> None: ...
    def give_up(self, ranks: Sequence[int]) -> None: ...
    @property
    def traffic(self) -> ExchangeTraffic: ...

class SharedExchange(_Exchange):
    def __init__(
        self,
        memory: object,
        layout: ExchangeLayout,
        segment: int,
        *,
        rank: int,
        timeout: float,
    ) -> None: ...
    def gather(self, x: int, count: int, rows: int) -> int: ...
    def scatter(self, parts: int, home: int) -> None: ...

RING_BYTES: int

class SocketExchange(_Exchange):
    """csrc/socket_exchange.h describes it. Its sockets are its own from now on."""

    def __init__(
        self,
        memory: object,
        *,
        ranks: int,
        tokens: int,
        top_k: int,
        row_bytes: int,
        rank: int,
        sockets: Sequence[int],
        rings: Sequence[int],
        crowded: bool,
        timeout: float,
    ) -> None: ...
