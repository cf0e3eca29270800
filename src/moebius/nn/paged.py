"""The past in serving: each layer's keys and values in a paged cache."""

from collections.abc import Sequence

from torch import Tensor

from moebius.nn.attention import Attention
from moebius.ops import AttentionPlan, LayerCache, Ops, Rotation
from moebius.ops.steps import Step


class PagedPast:
    """Store the step's keys and values in each layer's cache, and attend over what the cache holds.

    caches are one per layer, as Ops.make_cache made them, with blocks of block_size tokens;
    groups[i] is the group of layer i, by whose block table its cache is found.
    """

    def __init__(
        self,
        ops: Ops,
        caches: Sequence[LayerCache],
        groups: Sequence[int],
        step: Step,
        block_size: int,
    ) -> None:
        self._ops = ops
        self._caches = caches
        self._groups = groups
        self._step = step
        self._block_size = block_size
        self._plans: dict[tuple[int, int | None], AttentionPlan] = {}

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
        q_THN = self._ops.rotate_and_store(qkv_TI, rotation, cache, slots, q_weight, k_weight, eps)
        return self._ops.paged_attention(
            q_THN,
            cache,
            self._plan(group, spec.window),
            attention.scale,
            spec.softcap,
            attention.sinks,
        )
