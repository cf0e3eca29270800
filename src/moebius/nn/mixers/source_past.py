"""The past of an encoder and a decoder: in serving, in a paged cache; in inspection, nowhere.

A sequence in the cache is its prompt and behind it what the decoder reads, in one block table. A
decoder's layer holds at the prompt's positions the keys and values of what the encoder gave, and
behind them those of its own rows. An encoder's own are needed until its next layer, and lie where
the decoder's first layer will have its prompt's.
"""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from moebius.nn.mixers.relative import RelativeSelfAttention, SourceAttention, SourcePast
from moebius.nn.packed import PackedPast
from moebius.nn.paged import PagedPast
from moebius.ops import LayerCache, Ops, Rotation, StatePlan
from moebius.ops.host import HostResult
from moebius.ops.program import Rows
from moebius.ops.reference.attention import by_distance
from moebius.ops.steps import Step, StepInputs

SOURCE_TOKENS = "source tokens"
# A step as three kinds of rows see it (Step.of): a decoder's its own, an encoder's, and a decoder's
# what the encoder gave.
DECODER = 0
SOURCE = 1
GIVEN = 2


def with_sources(
    step: StepInputs,
    prompts: Sequence[Sequence[int]],
    tables: "Sequence[array[int]]",
    lengths: Sequence[int],
    block_size: int,
) -> StepInputs:
    """A decoder's step with what an encoder reads in it.

    prompts, tables: of the sequences whose encoder runs in this step, all of their prompts' tokens,
    and their blocks. lengths: how many tokens the prompt of each of the step's own sequences has.
    """
    starts = [0] * len(prompts)
    source = StepInputs.build(prompts, starts, tables, block_size, step.device)
    firsts = array("i", lengths)
    step.first_keys_host = firsts
    given = replace(step, seq_lens_host=firsts, first_keys_host=None, whole=True, group=GIVEN)
    step.others = (replace(source, whole=True, group=SOURCE), given)
    return step


class SourceRows:
    """The encoder's rows of the step under way, which its program asks the host for.

    most: how many a step has at most.
    """

    def __init__(self, most: int = 0) -> None:
        self.most = most
        self._source: StepInputs | None = None

    def begin(self, step: StepInputs) -> None:
        """The next run is of this step. One that nobody's prompt is in (a warm-up, a rank without
        work) has sequences whose prompts are of one token."""
        if not step.others:
            step = with_sources(step, [], [], [1] * len(step.seq_lens_host), 1)
            step.first_keys_host = None
        self._source = step.of(SOURCE)

    def bring(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Mapping[str, int]:
        """Their token ids and slots, for Ops.host."""
        source = self._source
        assert source is not None, "a step of an encoder has begun"
        count = len(source.input_ids_host)
        if count:
            ids_S, slots_S = outputs
            ids_S[:count] = source.input_ids
            slots_S[:count] = source.slot_mapping
        return {SOURCE_TOKENS: count}


class PagedSourcePast(PagedPast, SourcePast):
    """In a cache. caches, step and block_size are PagedPast's; `first` is the decoder's first
    layer, which has a cache, and so has every other one behind it."""

    def __init__(
        self,
        ops: Ops,
        caches: Sequence[LayerCache],
        step: Step,
        block_size: int,
        first: int,
        rows: SourceRows,
    ) -> None:
        PagedPast.__init__(self, ops, caches, [DECODER] * len(caches), step, block_size)
        SourcePast.__init__(self)
        self._first = first
        self._rows = rows
        self._slots_S: Tensor | None = None

    def source(self, input_ids_T: Tensor) -> tuple[Tensor, Tensor]:
        """See SourcePast: a row's number is its slot."""
        column = HostResult(Rows(SOURCE_TOKENS, self._rows.most), (), torch.int64)
        ids_S, slots_S = self._ops.host(self._rows.bring, [input_ids_T], [column, column])
        self._slots_S = slots_S
        return ids_S, slots_S

    def sequences(self) -> StatePlan:
        """See SourcePast."""
        return self._ops.plan_states(self._step.of(SOURCE))

    def attend_own(
        self, attention: RelativeSelfAttention, qkv_TI: Tensor, rotation: Rotation
    ) -> Tensor:
        """See SourcePast."""
        encoder = attention.spec.encoder
        cache = self._caches[self._first if encoder else attention.layer]
        slots = self._source_slots if encoder else self._step.slot_mapping
        q_THN = self._ops.rotate_and_store(qkv_TI, rotation, cache, slots)
        plan = self._plan(SOURCE if encoder else DECODER, None)
        bias_HR = self._shared[encoder]
        return self._ops.paged_attention(q_THN, cache, plan, 1.0, bias_HR=bias_HR)

    def keep_source(self, attention: SourceAttention, kv_SI: Tensor, rotation: Rotation) -> None:
        """See SourcePast."""
        cache = self._caches[attention.layer - 1]
        self._ops.rotate_and_store(kv_SI, rotation, cache, self._source_slots)

    def attend_source(self, attention: SourceAttention, q_THN: Tensor) -> Tensor:
        """See SourcePast."""
        cache = self._caches[attention.layer - 1]
        return self._ops.paged_attention(q_THN, cache, self._plan(GIVEN, None), 1.0)

    @property
    def _source_slots(self) -> Tensor:
        assert self._slots_S is not None, "the step's source is asked for first"
        return self._slots_S


class PackedSourcePast(PackedPast, SourcePast):
    """Documents packed in rows of one length, as PackedPast has them: the encoder reads each, and
    so does the decoder, which sees what the encoder made of all of it."""

    def __init__(self, ops: Ops, row_length: int, document_ids_T: Tensor | None = None) -> None:
        PackedPast.__init__(self, row_length, document_ids_T)
        SourcePast.__init__(self)
        self._ops = ops
        self._device: torch.device | str = "cpu"
        self._tokens = 0
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def source(self, input_ids_T: Tensor) -> tuple[Tensor, Tensor]:
        """See SourcePast: the decoder's own."""
        self._device = input_ids_T.device
        self._tokens = len(input_ids_T)
        return input_ids_T, torch.arange(self._tokens, device=self._device)

    def sequences(self) -> StatePlan:
        """See SourcePast."""
        return self._ops.plan_documents(self._starts(self._tokens), self._device)

    def attend_own(
        self, attention: RelativeSelfAttention, qkv_TI: Tensor, rotation: Rotation
    ) -> Tensor:
        """See SourcePast."""
        heads = attention.heads
        q_THN, k_THN, v_THN = qkv_TI.view(len(qkv_TI), 3, heads.num_heads, heads.head_dim).unbind(1)
        encoder = attention.spec.encoder
        return self._attend(q_THN, k_THN, v_THN, self._shared[encoder], causal=not encoder)

    def keep_source(self, attention: SourceAttention, kv_SI: Tensor, rotation: Rotation) -> None:
        """See SourcePast."""
        heads = attention.heads
        k_SHN, v_SHN = kv_SI.view(len(kv_SI), 2, heads.num_heads, heads.head_dim).unbind(1)
        self._kept[attention.layer] = (k_SHN, v_SHN)

    def attend_source(self, attention: SourceAttention, q_THN: Tensor) -> Tensor:
        """See SourcePast."""
        return self._attend(q_THN, *self._kept[attention.layer], None, causal=False)

    def _attend(
        self,
        q_THN: Tensor,
        k_THN: Tensor,
        v_THN: Tensor,
        bias_HR: Tensor | None,
        *,
        causal: bool,
    ) -> Tensor:
        length = self._length

        def in_rows(x_THN: Tensor) -> Tensor:
            return x_THN.reshape(-1, length, *x_THN.shape[1:]).transpose(1, 2)

        v_RHLN = in_rows(v_THN)
        at_L = torch.arange(length, device=q_THN.device)
        distance_LL = at_L - at_L.unsqueeze(1)
        scores_RHLL = (in_rows(q_THN) @ in_rows(k_THN).transpose(-1, -2)).float()
        if bias_HR is not None:
            scores_RHLL = scores_RHLL + by_distance(bias_HR, distance_LL)
        if causal:
            scores_RHLL = scores_RHLL.masked_fill(distance_LL > 0, -torch.inf)
        if self._document_ids_T is not None:
            ids_RL = self._document_ids_T.view(-1, length)
            apart_RLL = ids_RL.unsqueeze(1) != ids_RL.unsqueeze(2)
            scores_RHLL = scores_RHLL.masked_fill(apart_RLL.unsqueeze(1), -torch.inf)
        out_RHLN = torch.softmax(scores_RHLL, dim=-1).to(v_RHLN.dtype) @ v_RHLN
        return out_RHLN.transpose(1, 2).reshape(q_THN.shape)
