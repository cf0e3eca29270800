"""The kernels of csrc, as csrc/bindings.cpp shows them to ops/cpu.py. Arrays are addresses, 0 for
none."""

from collections.abc import Sequence

def available() -> list[str]: ...
def reads(dtype: int, format: int) -> bool: ...

class Matrix:
    def __init__(self, format: int, rows: int, columns: int, data: int) -> None: ...

class Linear:
    def __init__(self, dtype: int, weights: Sequence[Matrix], biases: Sequence[int]) -> None: ...

class Experts:
    def __init__(
        self,
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
    ) -> None: ...

class StepAttention:
    def __init__(self, window: int) -> None: ...
    def set(
        self, query_start: int, seq_lens: int, block_table: int, batch: int, width: int
    ) -> None: ...

class Program:
    def __init__(self, inputs: list[int]) -> None: ...
    def __call__(self, rows: int, inputs: list[int]) -> None: ...

class CacheShape:
    def __init__(self, block_size: int, kv_heads: int, head_dim: int, dtype: int) -> None: ...
    @property
    def block_bytes(self) -> int: ...

class RouterSettings:
    def __init__(self, *settings: float) -> None: ...

class Logits:
    def __init__(self, values: int, count: int, vocab: int) -> None: ...

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
    def __init__(self, limit: str, threads: int) -> None: ...
    @property
    def name(self) -> str: ...
    @property
    def threads(self) -> int: ...
    def record(self, program: Program | None) -> None: ...
    def embed(
        self,
        dtype: int,
        table: Matrix,
        ids: int,
        rows: int,
        multiplier: float,
        out: int,
    ) -> None: ...
    def linear(self, layers: Linear, x: int, rows: int, out: int, wide: bool) -> None: ...
    def experts(
        self, experts: Experts, x: int, rows: int, weights: int, ids: int, top_k: int, out: int
    ) -> None: ...
    def add_gated(
        self, dtype: int, a: int, b: int, gate: int, rows: int, size: int, out: int
    ) -> None: ...
    def rms_norm(
        self,
        dtype: int,
        x: int,
        update: int,
        multiplier: float,
        weight: int,
        rows: int,
        size: int,
        stride: int,
        eps: float,
        total: int,
        out: int,
    ) -> None: ...
    def rotation(
        self, positions: int, rows: int, inverse: int, half: int, factor: float, cos: int, sin: int
    ) -> None: ...
    def rotate_and_store(
        self,
        dtype: int,
        shape: CacheShape,
        qkv: int,
        rows: int,
        q_heads: int,
        cos: int,
        sin: int,
        half: int,
        q_norm: int,
        k_norm: int,
        eps: float,
        slots: int,
        cache: int,
        out: int,
    ) -> None: ...
    def attention(
        self,
        dtype: int,
        shape: CacheShape,
        step: StepAttention,
        rows: int,
        cache: int,
        q: int,
        q_heads: int,
        scale: float,
        softcap: float,
        sinks: int,
        out: int,
    ) -> None: ...
    def route(
        self,
        settings: RouterSettings,
        logits: int,
        rows: int,
        bias: int,
        weights: int,
        ids: int,
        pairs: int,
        sums: int,
    ) -> None: ...
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
