"""The operations of recurrent layers, whose past is a state of one size: causal convolutions, the
gated delta rule and selective state spaces, and what stands around them.

A step's rows are its sequences' next tokens, in order. Each sequence is computed token by token,
whether it brings one or a whole prompt: so a state is the same, bit for bit, however the tokens
before it were cut into steps, and wherever a snapshot of it was taken.

Shape legend, beside that of moebius.ops: S slots of states, C columns that are convolved, J taps,
H value heads, K size of a key head, V size of a value head. Of a selective state space: P size of a
head, M of its state for each of these.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from moebius.ops.config import ChannelDecay, DeltaSizes, GateFunction, HeadGates, ScanSizes
from moebius.ops.prepared import StatePlan
from moebius.ops.steps import Step


class RecurrentOps(ABC):
    """The part of `Ops` that recurrent layers ask for, and the gates of attention's heads.

    A state is a tensor with a row for each slot (moebius.ops.cache_spec: planes of `state`), read
    and rewritten in place in the slots that the plan says. It is None, or not looked at, where the
    plan keeps nothing.
    """

    @abstractmethod
    def plan_states(self, step: Step) -> StatePlan:
        """Which rows of a step are which sequence's, and in which slot its state lies.

        One plan serves all layers. A step without `states` keeps none: its sequences begin in it.
        Raises ValueError where one of them does not.
        """

    @abstractmethod
    def plan_documents(
        self, starts: Sequence[int], device: torch.device | str = "cpu"
    ) -> StatePlan:
        """Of rows starts[i] to starts[i + 1] - 1, sequence after sequence, whose states are zeros
        at first and not kept: packed documents of training and inspection."""

    @abstractmethod
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
        """Depthwise convolution over time of the C columns of x from `start`: (T, C).

        y_t = bias + sum_j weight[:, j] * x_{t - J + 1 + j}, summed in that order in float32 and
        rounded; then, if asked for, silu, rounded again. Weight and bias have x's dtype or float32.
        state: (S, J - 1, C) of x's dtype, the inputs before the step, oldest first; zeros before a
        sequence's begin. (So rows of it are rows of x.)
        """

    @abstractmethod
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
        """The gated delta rule (arXiv 2412.06464), token by token: (T, H * V).

        qkv_TC holds a token's query and key heads and its value heads side by side. gates_TI has,
        from column `start` on, a number b for each value head, then a number a for each. decay
        (below zero: -exp(A_log)) and dt_bias are float32. state: (S, H, K, V) float32.

        Queries and keys are divided by sqrt(sum of squares + 1e-6) a head, queries also by sqrt(K).
        Of each value head, with its key head's q and k and its own v, all in float32:

            beta = sigmoid(b), rounded to the dtype of the gates
            S <- exp(decay * softplus(a + dt_bias)) * S
            S <- S + k u^T, with u = beta * (v - S^T k)
            out = S^T q, rounded

        softplus(x) is x above 20. Sums over K have one order on every instruction set.
        """

    @abstractmethod
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
        """The gated delta rule with a decay for each channel (arXiv 2510.26692): (T, H * V).

        As gated_delta, but row k of a head's S is multiplied by exp(g_k), where g_k is what `decay`
        makes of f + dt_bias[h, k] and decay[h] in float32. beta_TI has a number b for each head
        from column `beta_start` on, channels_TI the H * K numbers f from `channels_start` on.
        """

    @abstractmethod
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
        """A selective state space (Mamba 2, arXiv 2405.21060), token by token: (T, H * P).

        xbc_TC holds a token's x of all heads, then B and C of each group, side by side; dt_TI has a
        number for each head from column `start` on. decay (-exp(A_log)), dt_bias and skip (D) are
        float32. state: (S, H, M, P) float32. Of each head, with its group's B and C, in float32 but
        for dt, which is rounded to its dtype after each step:

            dt = softplus(dt + dt_bias), without any bounds
            S <- exp(decay * dt) * S + B (dt x)^T
            out = S^T C + skip * x, rounded

        Sums over M have one order on every instruction set.
        """

    @abstractmethod
    def gated_norm(
        self,
        x_TI: Tensor,
        gate_TI: Tensor,
        start: int,
        weight_N: Tensor,
        eps: float,
        gate: GateFunction = "silu",
    ) -> Tensor:
        """rms_norm of each head of N values, as Ops.rms_norm has it, times gate(g): (T, I).

        g is the I columns of gate_TI from `start`. What is multiplied with the gate is rounded to
        x's dtype before, unless the weight is float32 beside x of 16 bits; gates are float32.
        """

    @abstractmethod
    def grouped_norm(
        self,
        x_TI: Tensor,
        gate_TI: Tensor,
        start: int,
        weight_I: Tensor,
        eps: float,
        groups: int,
    ) -> Tensor:
        """rms_norm of x * silu(g), of each of the groups that the I columns are divided into by
        itself: (T, I).

        g is the I columns of gate_TI from `start`. The product with g is float32; what is normed is
        rounded before the product with the weight as in Ops.rms_norm.
        """

    @abstractmethod
    def gate_heads(self, x_THN: Tensor, gates_TI: Tensor, at: HeadGates) -> Tensor:
        """x times gate(g), rounded before the product and after it: (T, H, N).

        The gates of a head are the columns of gates_TI that `at` says.
        """
