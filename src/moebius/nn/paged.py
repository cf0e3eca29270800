"""The past in serving: each layer's keys and values in a paged cache, or its sequences' states."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from moebius.nn.attention import Attention
from moebius.nn.mixers.latent import LatentRows
from moebius.nn.mixers.recurs import Recurrence, Recurrent
from moebius.ops import AttentionPlan, LayerCache, Ops, Rotation, StatePlan
from moebius.ops.steps import Step


class PagedPast:
    """Store the step's keys and values in each layer's cache, and attend over what the cache holds.

    caches are one per layer, as Ops.make_cache made them, with blocks of block_size tokens;
    groups[i] is the group of layer i, by whose block table its cache is found. states[i] are those
    of layer i, by their planes' names, for a model that has any.
    """

    def __init__(
        self,
        ops: Ops,
        caches: Sequence[LayerCache],
        groups: Sequence[int],
        step: Step,
        block_size: int,
        states: Sequence[Mapping[str, Tensor]] = (),
    ) -> None:
        self._ops = ops
        self._caches = caches
        self._groups = groups
        self._step = step
        self._block_size = block_size
        self._plans: dict[tuple[int, int | None], AttentionPlan] = {}
        self._states = states
        self._state_plan: StatePlan | None = None

    def _plan(self, group: int, window: int | None) -> AttentionPlan:
        """What attention needs to know of the step: one plan for a group's layers of a window."""
        key = (group, window)
        if key not in self._plans:
            step = self._step.of(group)
            self._plans[key] = self._ops.plan_attention(step, self._block_size, window)
        return self._plans[key]

    def attend(self, attention: Attention, qkv_TI: Tensor, rotation: Rotation) -> Tensor:
        """See moebius.nn.attention.Attends."""
        spec = attention.spec
        cache = self._caches[attention.layer]
        group = self._groups[attention.layer]
        slots = self._step.of(group).slot_mapping
        q_weight = k_weight = None
        eps = 0.0
        if attention.head_norms is not None:
            q_norm, k_norm = attention.head_norms
            q_weight = q_norm.weight
            k_weight = k_norm.weight
            eps = q_norm.eps
        q_THN = self._ops.rotate_and_store(
            qkv_TI,
            rotation,
            cache,
            slots,
            q_weight,
            k_weight,
            eps,
            attention.rows,
        )
        return self._ops.paged_attention(
            q_THN,
            cache,
            self._plan(group, spec.window),
            attention.scale,
            spec.softcap,
            attention.sinks,
        )

    def attend_latent(self, rows: LatentRows) -> Tensor:
        """See moebius.nn.mixers.latent.AttendsLatent."""
        cache = self._caches[rows.mixer.layer]
        group = self._groups[rows.mixer.layer]
        q_THN = rows.store(cache, self._step.of(group).slot_mapping)
        return self._ops.paged_attention(q_THN, cache, self._plan(group, None), rows.mixer.scale)

    def recur(self, mixer: Recurrent, x_TD: Tensor) -> Recurrence:
        """See moebius.nn.mixers.recurs.Recurs."""
        if self._state_plan is None:
            self._state_plan = self._ops.plan_states(self._step)
        return Recurrence(self._states[mixer.layer], self._state_plan)
