"""The operation that an encoder's experts ask for beside the others: a limit to what each takes."""

from abc import ABC, abstractmethod

from torch import Tensor

from moebius.ops.prepared import StatePlan


class EncoderOps(ABC):
    """The part of `Ops` for layers that read each sequence as a whole."""

    @abstractmethod
    def within_capacity(
        self,
        weights_TK: Tensor,
        expert_ids_TK: Tensor,
        num_experts: int,
        capacity: int,
        plan: StatePlan,
    ) -> Tensor:
        """Weights of choices, 0 for those that there is no room for: (T, K) float32.

        Of each sequence of the plan, as `plan_states` or `plan_documents` made it, an expert takes
        the first `capacity` choices, token after token: so what becomes of a token depends on its
        own sequence alone.
        """
