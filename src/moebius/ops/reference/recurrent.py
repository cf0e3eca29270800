"""Recurrent operations in plain PyTorch: token by token, all sequences of a step side by side.

They are differentiable where no state is kept. Sequences are taken longest first, so that those
which have a token left at a turn are always the first ones.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from moebius.ops.config import ChannelDecay, DeltaSizes, GateFunction, HeadGates, ScanSizes
from moebius.ops.interface import Ops
from moebius.ops.prepared import StatePlan, own
from moebius.ops.steps import Step, StepInputs
from moebius.ops.transfer import send_numbers

# Added to the sum of squares that queries and keys are divided by the root of.
_L2_EPS = 1e-6

GATES: Mapping[GateFunction, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "identity": lambda x: x,
}


@dataclass(frozen=True, slots=True, eq=False)
class ReferenceStatePlan(StatePlan):
    """The B sequences of a step that bring rows, longest first.

    starts     first row of each (B,)
    slots      of their states (B,); None where none is kept
    order      the rows turn by turn: the first token of each sequence, the second of each... (T,)
    counts     how many sequences have a token at each turn
    sequence   that each row is of (T,)
    """

    starts: Tensor
    slots: Tensor | None
    order: Tensor
    counts: Sequence[int]
    sequence: Tensor

    def at_first(self, state: Tensor | None, row: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Each sequence's state (B, *row) before the step."""
        if self.slots is None:
            return torch.zeros((len(self.starts), *row), dtype=dtype, device=self.starts.device)
        return require_state(state, row, dtype)[self.slots]

    def keep(self, state: Tensor | None, after: Tensor) -> None:
        """What the states are after the step."""
        if state is not None and self.slots is not None:
            state.index_copy_(0, self.slots, after)

    def turns(self, *inputs: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Of rows (T, ...), those of each turn."""
        return zip(*(torch.split(x[self.order], list(self.counts)) for x in inputs), strict=True)

    def in_order(self, outs: Sequence[Tensor], width: int) -> Tensor:
        """Of what each turn gave, the rows as they stand in the step: (T, width)."""
        if not outs:
            return torch.zeros(0, width, device=self.order.device)
        return torch.cat(list(outs)).flatten(1)[torch.argsort(self.order)]


def _plan(
    starts: Sequence[int], slots: Sequence[int] | None, device: torch.device | str
) -> ReferenceStatePlan:
    lengths = [stop - start for start, stop in pairwise(starts)]
    longest = sorted((b for b, n in enumerate(lengths) if n), key=lambda b: -lengths[b])
    counts = [0] * (lengths[longest[0]] if longest else 0)
    for b in longest:
        for turn in range(lengths[b]):
            counts[turn] += 1
    order = [starts[b] + turn for turn, n in enumerate(counts) for b in longest[:n]]
    sequence = [0] * len(order)
    for place, b in enumerate(longest):
        sequence[starts[b] : starts[b + 1]] = [place] * lengths[b]

    def tensor(values: Sequence[int]) -> Tensor:
        return send_numbers(values, torch.int64, device)

    return ReferenceStatePlan(
        tensor([starts[b] for b in longest]),
        None if slots is None else tensor([slots[b] for b in longest]),
        tensor(order),
        counts,
        tensor(sequence),
    )


class RecurrentOps(Ops):
    def plan_states(self, step: Step) -> StatePlan:
        given = own(step, StepInputs)
        require_states(given)
        slots = None if given.states is None else given.states.slots
        return _plan(given.query_start_host, slots, given.device)

    def plan_documents(
        self, starts: Sequence[int], device: torch.device | str = "cpu"
    ) -> StatePlan:
        return _plan(starts, None, device)

    def causal_conv(
        self,
        x_TI: Tensor,
        start: int,
        weight_CJ: Tensor,
        state: Tensor | None,
        plan: StatePlan,
        bias_C: Tensor | None = None,
        *,
        silu: bool = True,
    ) -> Tensor:
        planned = own(plan, ReferenceStatePlan)
        channels, taps = weight_CJ.shape
        x_TC = x_TI[:, start : start + channels]
        before_BJC = planned.at_first(state, (taps - 1, channels), x_TI.dtype)
        # All that is read: the states' rows, then the step's. Row t of its sequence, i rows
        # earlier, lies i rows before it or, from the sequence's first row on, in its state.
        read_PC = torch.cat((before_BJC.flatten(0, 1), x_TC))
        states = len(before_BJC) * (taps - 1)
        row_T = torch.arange(len(x_TI), device=x_TI.device)
        since_T = row_T - planned.starts[planned.sequence]

        def earlier(i: int | Tensor, row: Tensor, since: Tensor, sequence: Tensor) -> Tensor:
            in_state = (sequence + 1) * (taps - 1) + since - i
            return torch.where(since >= i, states + row - i, in_state)

        sum_TC = torch.zeros_like(x_TC, dtype=torch.float32)
        if bias_C is not None:
            sum_TC = sum_TC + bias_C.float()
        for tap in range(taps):
            at_T = earlier(taps - 1 - tap, row_T, since_T, planned.sequence)
            sum_TC = sum_TC + weight_CJ[:, tap].float() * read_PC[at_T].float()
        out_TC = sum_TC.to(x_TI.dtype)
        if planned.slots is not None:
            back_J = torch.arange(taps - 2, -1, -1, device=x_TI.device)
            sequence_B = torch.arange(len(planned.starts), device=x_TI.device)
            rows_B = torch.bincount(planned.sequence, minlength=len(planned.starts))
            last_B1 = (rows_B - 1).unsqueeze(1)
            first_B1 = planned.starts.unsqueeze(1)
            kept_BJ = earlier(back_J, first_B1 + last_B1, last_B1, sequence_B.unsqueeze(1))
            planned.keep(state, read_PC[kept_BJ])
        return F.silu(out_TC.float()).to(x_TI.dtype) if silu else out_TC

    def gated_delta(
        self,
        qkv_TC: Tensor,
        gates_TI: Tensor,
        start: int,
        decay_H: Tensor,
        dt_bias_H: Tensor,
        state: Tensor | None,
        plan: StatePlan,
        sizes: DeltaSizes,
    ) -> Tensor:
        heads = sizes.value_heads
        b_TH, a_TH = torch.split(gates_TI[:, start : start + 2 * heads], heads, dim=1)
        kept_TH = torch.exp(decay_H * F.softplus(a_TH.float() + dt_bias_H))
        return _delta(qkv_TC, b_TH, kept_TH.unsqueeze(-1), state, plan, sizes)

    def kimi_delta(
        self,
        qkv_TC: Tensor,
        beta_TI: Tensor,
        beta_start: int,
        channels_TI: Tensor,
        channels_start: int,
        decay_H: Tensor,
        dt_bias_HK: Tensor,
        state: Tensor | None,
        plan: StatePlan,
        sizes: DeltaSizes,
        decay: ChannelDecay,
    ) -> Tensor:
        heads = sizes.value_heads
        b_TH = beta_TI[:, beta_start : beta_start + heads]
        f_TI = channels_TI[:, channels_start : channels_start + heads * sizes.key_dim]
        f_THK = f_TI.float().view(len(f_TI), heads, sizes.key_dim) + dt_bias_HK
        decay_H1 = decay_H.unsqueeze(-1)
        if decay.lower is None:
            exponent_THK = decay_H1 * F.softplus(f_THK)
        else:
            exponent_THK = decay.lower * torch.sigmoid(-decay_H1 * f_THK)
        if decay.rounded:
            exponent_THK = exponent_THK.to(channels_TI.dtype).float()
        return _delta(qkv_TC, b_TH, torch.exp(exponent_THK), state, plan, sizes)

    def selective_scan(
        self,
        xbc_TC: Tensor,
        dt_TI: Tensor,
        start: int,
        decay_H: Tensor,
        dt_bias_H: Tensor,
        skip_H: Tensor,
        state: Tensor | None,
        plan: StatePlan,
        sizes: ScanSizes,
    ) -> Tensor:
        planned = own(plan, ReferenceStatePlan)
        rows = len(xbc_TC)
        dtype = xbc_TC.dtype
        shared = [sizes.groups * sizes.state_dim] * 2
        x_TI, b_TI, c_TI = torch.split(xbc_TC.float(), [sizes.out_size, *shared], dim=1)
        x_THP = x_TI.view(rows, sizes.heads, sizes.head_dim)

        def of_heads(y_TI: Tensor) -> Tensor:
            y_TGM = y_TI.view(rows, sizes.groups, sizes.state_dim)
            return y_TGM.repeat_interleave(sizes.heads // sizes.groups, dim=1)

        summed_TH = dt_TI[:, start : start + sizes.heads] + dt_bias_H.to(dtype)
        dt_TH = F.softplus(summed_TH.float()).to(dtype).float()
        kept_TH = torch.exp(dt_TH * decay_H)
        into_THP = dt_TH.unsqueeze(-1) * x_THP
        row = (sizes.heads, sizes.state_dim, sizes.head_dim)
        state_BHMP = planned.at_first(state, row, torch.float32)
        outs = []
        done: list[Tensor] = []
        inputs = (of_heads(b_TI), of_heads(c_TI), into_THP, kept_TH)
        for b, c, into, kept in planned.turns(*inputs):
            done.append(state_BHMP[len(b) :])
            state_BHMP = state_BHMP[: len(b)] * kept[..., None, None]
            state_BHMP = state_BHMP + b.unsqueeze(-1) * into.unsqueeze(-2)
            outs.append((state_BHMP * c.unsqueeze(-1)).sum(-2))
        planned.keep(state, torch.cat([state_BHMP, *reversed(done)]))
        read_TI = planned.in_order(outs, sizes.out_size)
        skipped_THP = skip_H.unsqueeze(-1) * x_THP
        return (read_TI + skipped_THP.flatten(1)).to(dtype)

    def gated_norm(
        self,
        x_TI: Tensor,
        gate_TI: Tensor,
        start: int,
        weight_N: Tensor,
        eps: float,
        gate: GateFunction = "silu",
    ) -> Tensor:
        rows, width = x_TI.shape
        size = len(weight_N)
        x_THN = x_TI.float().view(rows, width // size, size)
        normed_THN = x_THN * torch.rsqrt(x_THN.square().mean(-1, keepdim=True) + eps)
        if weight_N.dtype == torch.float32:
            normed_THN = normed_THN * weight_N
        else:
            normed_THN = (normed_THN.to(x_TI.dtype) * weight_N).float()
        gates_TI = gate_TI[:, start : start + width].float()
        return (normed_THN.view(rows, width) * GATES[gate](gates_TI)).to(x_TI.dtype)

    def grouped_norm(
        self,
        x_TI: Tensor,
        gate_TI: Tensor,
        start: int,
        weight_I: Tensor,
        eps: float,
        groups: int,
    ) -> Tensor:
        rows, width = x_TI.shape
        gated_TI = x_TI.float() * F.silu(gate_TI[:, start : start + width].float())
        gated_TGN = gated_TI.view(rows, groups, width // groups)
        normed_TGN = gated_TGN * torch.rsqrt(gated_TGN.square().mean(-1, keepdim=True) + eps)
        normed_TI = normed_TGN.view(rows, width)
        if weight_I.dtype == torch.float32:
            return (normed_TI * weight_I).to(x_TI.dtype)
        return normed_TI.to(x_TI.dtype) * weight_I

    def gate_heads(self, x_THN: Tensor, gates_TI: Tensor, at: HeadGates) -> Tensor:
        rows, heads, size = x_THN.shape
        width = 1 if at.single else size
        column_H = at.start + at.stride * torch.arange(heads, device=x_THN.device)
        column_HN = column_H.unsqueeze(1) + torch.arange(width, device=x_THN.device)
        gates_THN = gates_TI[:, column_HN.flatten()].view(rows, heads, width)
        return x_THN * GATES[at.function](gates_THN.float()).to(x_THN.dtype)


def require_state(state: Tensor | None, row: Sequence[int], dtype: torch.dtype) -> Tensor:
    """What a layer keeps, which must be (S, *row) of that dtype. Raises ValueError."""
    if state is None:
        raise ValueError("the step's states are kept, and none are given")
    if state.shape[1:] != tuple(row) or state.dtype != dtype:
        raise ValueError(
            f"states are {tuple(state.shape[1:])} in {state.dtype}; they must be {tuple(row)} "
            f"in {dtype}"
        )
    return state


def require_states(step: StepInputs) -> None:
    """ValueError where a step has no states for sequences that began before it."""
    if step.states is not None:
        return
    for b, (start, stop) in enumerate(pairwise(step.query_start_host)):
        if step.seq_lens_host[b] != stop - start:
            raise ValueError(
                f"a step without states brings the last {stop - start} tokens of a sequence of "
                f"{step.seq_lens_host[b]}, whose state is nowhere"
            )


def _delta(
    qkv_TC: Tensor,
    b_TH: Tensor,
    kept_THX: Tensor,
    state: Tensor | None,
    plan: StatePlan,
    sizes: DeltaSizes,
) -> Tensor:
    """The delta rule where so much is kept of each head's state, or of each of its rows."""
    planned = own(plan, ReferenceStatePlan)
    q_THK, k_THK, v_THV = _delta_heads(qkv_TC, sizes)
    beta_TH = torch.sigmoid(b_TH.float()).to(b_TH.dtype).float()
    row = (sizes.value_heads, sizes.key_dim, sizes.value_dim)
    state_BHKV = planned.at_first(state, row, torch.float32)
    outs = []
    done: list[Tensor] = []
    for q, k, v, beta, kept in planned.turns(q_THK, k_THK, v_THV, beta_TH, kept_THX):
        done.append(state_BHKV[len(q) :])
        state_BHKV = state_BHKV[: len(q)] * kept.unsqueeze(-1)
        u = beta.unsqueeze(-1) * (v - (state_BHKV * k.unsqueeze(-1)).sum(-2))
        state_BHKV = state_BHKV + k.unsqueeze(-1) * u.unsqueeze(-2)
        outs.append((state_BHKV * q.unsqueeze(-1)).sum(-2))
    planned.keep(state, torch.cat([state_BHKV, *reversed(done)]))
    return planned.in_order(outs, sizes.out_size).to(qkv_TC.dtype)


def _delta_heads(qkv_TC: Tensor, sizes: DeltaSizes) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys (T, H, K) of each value head, of length 1, and its values (T, H, V)."""
    keys = sizes.key_heads * sizes.key_dim
    q_TI, k_TI, v_TI = torch.split(qkv_TC.float(), [keys, keys, sizes.out_size], dim=1)
    rows = len(qkv_TC)
    of_value_head = [sizes.key_head(h) for h in range(sizes.value_heads)]

    def normed(x_TI: Tensor) -> Tensor:
        x_TGK = x_TI.view(rows, sizes.key_heads, sizes.key_dim)
        x_TGK = x_TGK * torch.rsqrt(x_TGK.square().sum(-1, keepdim=True) + _L2_EPS)
        return x_TGK[:, of_value_head]

    q_THK = normed(q_TI) * sizes.key_dim**-0.5
    return q_THK, normed(k_TI), v_TI.view(rows, sizes.value_heads, sizes.value_dim)
