"""`Ops`: every operation of a decoder, with its shapes, dtypes and rounding.

A backend implements all of them. What it can do, and how, it declares in `capability`; whoever
serves asks before it computes. Unless said otherwise tensors are contiguous, results are new and
have the dtype of the first argument, and a row of a result depends on the same row of the
arguments alone; whether that holds bit for bit, in any batch, is for `capability` to say.

The legend of shape suffixes is in moebius.ops.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from moebius.ops.cache_spec import CacheSpec
from moebius.ops.capability import Capability, Use
from moebius.ops.config import PLAIN_HEADS, Activation, HeadRows, RouterConfig
from moebius.ops.encoder import EncoderOps
from moebius.ops.host import HostFunction, HostResult
from moebius.ops.latent import LatentOps
from moebius.ops.prepared import AttentionPlan, LayerCache, PreparedExperts, PreparedLinear
from moebius.ops.program import Given, Program, Trace
from moebius.ops.recurrent import RecurrentOps
from moebius.ops.sampling import SamplerOps
from moebius.ops.sources import Source, Wanted
from moebius.ops.steps import ExpertWeights, Pair, Rotation, RouterTally, Step
from moebius.ops.weights import Weight


class Ops(SamplerOps, RecurrentOps, LatentOps, EncoderOps):
    """What a backend computes: all of a step, with what the classes that it is made of say of it.

    name          names the backend in the fingerprint
    own_threads   it computes on threads of its own, beside which torch needs but one
    """

    name: str
    own_threads: bool = False

    @abstractmethod
    def capability(self, use: Use) -> Capability | None:
        """How this backend computes `use`; None where it does not."""

    def batch_invariant(self, uses: Iterable[Use]) -> bool:
        """Whether all of `uses` are: one that is not, or is not there, is enough for a no."""
        found = [self.capability(use) for use in uses]
        return all(each is not None and each.batch_invariant for each in found)

    # Programs

    @abstractmethod
    def trace(self, compute: Callable[[Wanted], Tensor], source: Source[Given, Wanted]) -> Trace:
        """What `record` would take, without allocating: weights and caches may lie on meta."""

    @abstractmethod
    def record(
        self,
        compute: Callable[[Wanted], Tensor],
        source: Source[Given, Wanted],
        device: torch.device | str,
        planned: Trace | None = None,
    ) -> Program[Given]:
        """A program that computes what `compute` does, on what `source` brings each time.

        planned: what `trace` said of the same computation, which need not be found out again.

        Where `compute` reads values, lets torch compute between the operations, or is not for this
        backend to record, the program calls it as it is, and its trace says why. Where it is
        recorded, `compute` must call the same operations whatever it is given; Python's own state
        is read at recording alone, and numbers of rows are then the most that there may be.
        """

    @abstractmethod
    def host(
        self, function: HostFunction, inputs: Sequence[Tensor], outputs: Sequence[HostResult]
    ) -> list[Tensor]:
        """Call `function(inputs, outputs)` between this backend's own calls, in each run anew.

        It is handed as many rows as there are in that run, writes the outputs, and returns by name
        the counts that it decides. What it raises ends the run, and so does a count that it does
        not return (ValueError). The memory is other calls' before and after. Promise P1 is the
        function's to keep: it moves rows, or computes each from itself alone.
        """

    # Rows and linear layers

    @abstractmethod
    def formats(self, dtype: torch.dtype) -> frozenset[str]:
        """Formats of matrices that this backend is meant to read in place, computing in `dtype`.

        By their names without parameters; of those whose groups of columns have any size, with
        ` of 32` behind it, where only groups of whole blocks of 32 are meant, and ` with zeros`
        where these have zero points. A loader widens what is stored in another.
        """

    @abstractmethod
    def embed(
        self,
        input_ids_T: Tensor,
        table_VD: Weight,
        multiplier: float = 1.0,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """multiplier * table[input_ids], rounded once to `dtype` (None: the table's): (T, D).

        input_ids_T: int64. Raises IndexError for an id outside the table.
        """

    @abstractmethod
    def prepare_linear(
        self, *layers: tuple[Weight, Tensor | None], dtype: torch.dtype | None = None
    ) -> PreparedLinear:
        """What `linear` and `logits` need to know of linear layers of one input of `dtype`.

        layers: (weight (O, I), bias (O,) or None) each. Weights may have any of the formats for
        `dtype`, biases have it; None is the dtype that all of them have. The tensors stay where
        they are. Raises ValueError for what the backend cannot read in place.
        """

    @abstractmethod
    def linear(self, x_TI: Tensor, layers: PreparedLinear) -> Tensor:
        """x W^T + b of each of prepare_linear's layers, side by side: (T, sum of O).

        Sums in float32 at least, rounded once.
        """

    @abstractmethod
    def logits(self, x_TI: Tensor, layers: PreparedLinear) -> Tensor:
        """The same in float32, never rounded to the model's dtype: for vocabularies and routers."""

    # Norms, rotation, residuals

    @abstractmethod
    def rms_norm(
        self, x_TD: Tensor, weight_D: Tensor, eps: float, *, less_mean: bool = False
    ) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467); with
        less_mean, of x - mean(x) (LayerNorm, arXiv 1607.06450).

        Inside in float32; rounded before the product with the weight and after it. A weight may be
        float32 where x is not, here and wherever a norm is: then rounded after it alone. x may have
        more dimensions than two.
        """

    @abstractmethod
    def add_rms_norm(
        self,
        x_TD: Tensor,
        update_TD: Tensor,
        multiplier: float,
        weight_D: Tensor,
        eps: float,
        *,
        less_mean: bool = False,
        scale_1: Tensor | None = None,
    ) -> Pair:
        """The residual stream x + multiplier * update, rounded once, and its rms_norm; where scale
        (float32) is given, the stream is that times the sum, rounded again."""

    @abstractmethod
    def rms_norm_part(self, x_TI: Tensor, start: int, weight_D: Tensor, eps: float) -> Tensor:
        """x with rms_norm over the D columns from `start`; x itself may be changed."""

    @abstractmethod
    def clip(self, x_TD: Tensor, limit: float) -> Tensor:
        """x with every value between -limit and limit, rounded to its dtype; NaN stays NaN."""

    @abstractmethod
    def softcap(self, x_LV: Tensor, cap: float) -> Tensor:
        """cap * tanh(x / cap) of float32 (Gemma 2, arXiv 2408.00118)."""

    @abstractmethod
    def divide(self, x_LV: Tensor, divisor: float) -> Tensor:
        """x / divisor of float32."""

    @abstractmethod
    def rotation(self, positions_T: Tensor, inverse_R: Tensor, factor: float) -> Pair:
        """cos and sin, times `factor`, of positions times inverse frequencies: (T, R) each.

        positions_T: int64. inverse_R: float32, radians a position. Results are float32.
        """

    @abstractmethod
    def rotary(self, x_THN: Tensor, rotation: Rotation) -> Tensor:
        """Rotate the first 2R of a head's N values in pairs (arXiv 2104.09864).

        Inside in float32, rounded once.
        """

    @abstractmethod
    def add_gated(self, a_TD: Tensor, b_TD: Tensor, gate_T1: Tensor | None = None) -> Tensor:
        """a + sigmoid(gate) * b, with float32 gates; a + b without.

        So a shared expert joins the others.
        """

    # Attention and its cache

    @abstractmethod
    def cache_bytes_per_block(self, spec: CacheSpec, block_size: int) -> int:
        """Bytes that one layer needs for one block of `block_size` tokens."""

    @abstractmethod
    def scratch_bytes(self, widest: int, spec: CacheSpec, block_size: int, context: int) -> int:
        """The most memory that this backend keeps beside programs and caches, as far as it knows.

        For layers of up to `widest` inputs, and attention to up to `context` tokens of a cache.
        """

    @abstractmethod
    def make_cache(
        self,
        buffer: Tensor,
        spec: CacheSpec,
        block_size: int,
        key_offset_GN: Tensor | None = None,
        stride: int | None = None,
    ) -> LayerCache:
        """One layer's cache over `buffer`, whose layout is the backend's own.

        buffer: uint8, a multiple of cache_bytes_per_block bytes, or that of the last block behind a
        multiple of `stride`, by which blocks lie apart. spec: planes k (G, N) and v (G, Nv), whose
        sizes may differ. Of int8 the cache holds codes and scales, as
        ops/reference/codes.py makes them, of the rotated keys less key_offset_GN (float32), and of
        the values. Raises ValueError for an offset with keys that are not int8.
        """

    @property
    @abstractmethod
    def cache_layout(self) -> str:
        """Names the order of values in a block, for bytes that leave the cache and come back."""

    @abstractmethod
    def block_memory(self, cache: LayerCache, block: int) -> Sequence[Tensor]:
        """All of what a layer's cache holds of a block, as tensors over its memory."""

    @abstractmethod
    def rotate_and_store(
        self,
        qkv_TI: Tensor,
        rotation: Rotation,
        cache: LayerCache,
        slot_mapping_T: Tensor,
        q_norm_N: Tensor | None = None,
        k_norm_N: Tensor | None = None,
        eps: float = 0.0,
        heads: HeadRows = PLAIN_HEADS,
    ) -> Tensor:
        """The step's queries (T, H, N), of which there may be none; its keys and values go to the
        cache.

        qkv_TI holds a token's query, key and value heads side by side: (T, (H + G) * N + G * Nv),
        unless `heads` says otherwise. Queries and keys are normed per head where weights of one
        dtype are given, then rotated as by `rotary`. slot_mapping_T: int64, block id * block_size
        + offset. Keys for an int8 cache are not rounded in between.
        """

    @abstractmethod
    def plan_attention(
        self, step: Step, block_size: int, window: int | None = None
    ) -> AttentionPlan:
        """What paged_attention needs to know of a step, once for all layers with one window."""

    @abstractmethod
    def paged_attention(
        self,
        q_THN: Tensor,
        cache: LayerCache,
        plan: AttentionPlan,
        scale: float,
        softcap: float | None = None,
        sinks_H: Tensor | None = None,
        bias_HR: Tensor | None = None,
    ) -> Tensor:
        """Causal attention of each row over its own sequence's cached keys and values: (T, H, Nv).

        The step's rows are its sequences' last tokens, in order, already written to the cache. A
        row at position p sees positions max(0, p - window + 1) to p. softcap: scores become c *
        tanh(scores / c) (Gemma 2, arXiv 2408.00118). sinks_H: float32 scores of one more key a
        head, without a value (gpt-oss, arXiv 2508.10925). bias_HR: float32, what is added to the
        score of a key at each distance (its position less the row's) from -(R // 2) to R // 2;
        farther away it is that of the end (T5, arXiv 1910.10683). StepInputs.first_keys and whole
        say which other positions than these a row sees.

        An offset that keys are held less is the same in all of a query's scores, which softmax does
        not see; where scores are capped, or there are sinks, it is added back.
        """

    # Experts

    @abstractmethod
    def route(
        self,
        logits_TE: Tensor,
        config: RouterConfig,
        selection_bias_E: Tensor | None = None,
        tally: RouterTally | None = None,
        expert_scale_E: Tensor | None = None,
    ) -> Pair:
        """Choose experts: weights (T, K) float32 and expert ids (T, K) int64, best first.

        logits_TE: float32. Ties go to the lowest id. expert_scale_E (float32) multiplies the
        weights. What was chosen is added to the tally, where there is one.
        """

    @abstractmethod
    def prepare_experts(
        self,
        weights: ExpertWeights,
        activation: Activation,
        dtype: torch.dtype | None = None,
        *,
        on_disk: bool = False,
    ) -> PreparedExperts:
        """What `experts` and `expert_rows` need of one layer's experts; the tensors stay in place.

        Formats and dtype are as in prepare_linear. on_disk: they lie in files whose pages need not
        be there; a backend may ask for those of the experts that were chosen, all at once, before
        it computes. Raises ValueError for what the backend cannot read in place.
        """

    @abstractmethod
    def experts(
        self,
        x_TD: Tensor,
        weights_TK: Tensor | None,
        expert_ids_TK: Tensor | None,
        experts: PreparedExperts,
    ) -> Tensor:
        """What `expert_rows` gives, summed as by `combine`: (T, D).

        Without weights and ids there is one expert, which serves every token: a dense
        feed-forward. Raises IndexError for an id that is no expert's, or a hole's.
        """

    @abstractmethod
    def expert_rows(self, x_RD: Tensor, expert_ids_RK: Tensor, experts: PreparedExperts) -> Tensor:
        """Gated feed-forward down(act(gate x) * up x) of each choice's expert, rounded: (R, K, D).

        Without up it is down(act(gate x)); ClampedSwiGLU joins the two otherwise. expert_ids_RK:
        int64; E stands for none, whose row holds anything. Raises IndexError as `experts`.
        """

    @abstractmethod
    def combine(self, x_TKD: Tensor, weights_TK: Tensor) -> Tensor:
        """The sum over k, in that order, of weights (float32) times rows, rounded once: (T, D)."""
