"""What a step computes and the memory that this takes, told before weights or cache are there.

The runner records its programs with the functions that are here followed on a decoder without
memory, so that what is planned is what will be allocated, to the byte.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moebius.engine.kv_cache import KVCache
from moebius.engine.shared_head import SharedHead
from moebius.engine.step_memory import StepMemory
from moebius.errors import ConfigError
from moebius.models.config import ModelConfig
from moebius.models.decoder import Decoder
from moebius.models.encoder_decoder import EncoderDecoder
from moebius.nn.mixers.source_past import PagedSourcePast
from moebius.nn.paged import PagedPast
from moebius.ops import Operation, Ops, Use
from moebius.ops.formats import dtype_name
from moebius.ops.program import Trace
from moebius.ops.sources import LOGITS, Decodes, RowSource, StepSource
from moebius.ops.steps import Step


@dataclass(frozen=True, slots=True)
class StepRows:
    """The most rows of a step, and the most whose logits are asked for at a time.

    sequences, context: the most sequences of a step, and the most tokens of one; 0: not known.
    """

    tokens: int
    logits: int
    sequences: int = 0
    context: int = 0

    def step_source(
        self, groups: int, block_size: int | None = None, *, states: bool = False
    ) -> StepSource:
        """Steps of a model whose layers form so many groups, over a cache of such blocks, and of
        states if it has any."""
        decodes = None
        if block_size and self.sequences and self.context:
            decodes = Decodes(self.sequences, self.context, block_size, states)
        return StepSource(self.tokens, groups, decodes)

    def head_source(self) -> RowSource:
        return RowSource(LOGITS, self.logits)


@dataclass(frozen=True, slots=True)
class Workspace:
    """The programs of a step's hidden states and of its logits, as they will be recorded.

    shared_head   of few logits, that ranks make together; None where there are no ranks
    uses          all operations from tokens to tokens, as far as they were followed
    scratch       what the backend's operations keep beside that, in bytes
    """

    step: Trace
    head: Trace
    shared_head: Trace | None
    uses: frozenset[Use]
    scratch: int

    @property
    def programs(self) -> tuple[Trace, ...]:
        some = (self.step, self.head)
        return some if self.shared_head is None else (*some, self.shared_head)

    @property
    def recorded(self) -> bool:
        return all(program.recorded for program in self.programs)

    @property
    def reason(self) -> str:
        """Why not all of it is recorded; empty where it is."""
        return next((program.reason for program in self.programs if program.reason), "")

    @property
    def nbytes(self) -> int:
        return sum(program.nbytes for program in self.programs) + self.scratch

    @property
    def memory(self) -> StepMemory:
        recorded = self.nbytes - self.scratch if self.recorded else None
        return StepMemory(recorded, self.scratch)

    def batch_invariant(self, ops: Ops) -> bool:
        """Whether every operation is, and there are no others: what torch computes between them
        is nobody's to promise."""
        return self.recorded and ops.batch_invariant(self.uses)


@torch.inference_mode()
def forward(model: Decoder, cache: KVCache, step: Step) -> Tensor:
    """A step's final hidden states (T, D), its keys and values written to the cache."""
    ops = model.ops
    size = cache.block_size
    past: PagedPast
    if isinstance(model, EncoderDecoder):
        first = model.config.encoder_layers
        past = PagedSourcePast(ops, cache.layers, step, size, first, model.rows)
    else:
        past = PagedPast(ops, cache.layers, cache.groups, step, size, cache.states)
    hidden_TD: Tensor = model(step.input_ids, step.positions, past)[0]
    return hidden_TD


@torch.inference_mode()
def head(model: Decoder, hidden_TD: Tensor, rows_L: Tensor) -> Tensor:
    """Logits (L, V), float32, of rows of hidden states."""
    return model.logits(model.ops.embed(rows_L, hidden_TD))


def _most_inputs(config: ModelConfig) -> int:
    """Of any matrix of the model."""
    matrices = (
        parameter.shape[1]
        for layer in set(config.layers)
        for parameter in layer.parameters(config.hidden_size)
        if len(parameter.shape) == 2
    )
    return max(config.hidden_size, *matrices)


def plan_workspace(
    model: Decoder,
    block_size: int,
    rows: StepRows,
    context: int,
    kv_dtype: torch.dtype | None = None,
) -> Workspace:
    """Follow a step of a decoder that has shapes and no memory, on the device "meta".

    context: the most tokens of a sequence. kv_dtype: what keys and values are held in; None: as
    they are computed.

    Raises ConfigError where the backend does not compute in `dtype`.
    """
    config = model.config
    ops = model.ops
    dtype = model.dtype
    if ops.capability(Use(Operation.LINEAR, dtype)) is None:
        raise ConfigError(
            f"the {ops.name} kernels do not compute in {dtype_name(dtype)}; use another --dtype"
        )
    meta = torch.device("meta")
    specs = config.caches(dtype, kv_dtype)
    cache = KVCache(specs, ops, num_blocks=1, block_size=block_size, device=meta)
    hidden_TD = torch.empty(rows.tokens, config.hidden_size, dtype=dtype, device=meta)
    if isinstance(model, EncoderDecoder):
        model.rows.most = rows.tokens
    step = ops.trace(
        lambda step: forward(model, cache, step), rows.step_source(len(cache.layout.windows))
    )
    logits = ops.trace(lambda rows_L: head(model, hidden_TD, rows_L), rows.head_source())
    together = SharedHead.of(model)
    shared = None
    if together is not None:
        few = together
        shared = ops.trace(lambda rows_G: few.logits(hidden_TD, rows_G), few.source)
    sampling = Use(Operation.SAMPLING, torch.float32)
    scratch = max(
        (
            ops.scratch_bytes(_most_inputs(config), spec, block_size, context)
            for spec in specs
            if spec.token
        ),
        default=0,
    )
    return Workspace(step, logits, shared, step.uses | logits.uses | {sampling}, scratch)
