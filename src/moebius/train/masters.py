"""Master weights in float32, the rounded copies that the decoder computes with, and AdamW."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from moebius.moe.losses import updated_bias
from moebius.train.tables import TrainingRecipe

SELECTION_BIAS = ".router.selection_bias"
"""How the names of the biases end that are moved after a step, and never trained."""

_MOMENTS = {"mean": "exp_avg", "square": "exp_avg_sq"}
"""What the optimiser calls them."""

_BLOCK = 4096


def bytes_a_weight(dtype: torch.dtype) -> int:
    """Of a copy in this dtype, its master, gradient and two moments, where it is trained."""
    return dtype.itemsize + 4 * torch.float32.itemsize


class Masters:
    """Every weight of a decoder in float32, and what changes those that are trained.

    copies           the decoder's own parameters by name; those that require a gradient are trained
    gradient         of all trained weights in one vector
    shared_gradient  its first part, of weights that all ranks have: they add it up in one exchange
    own_gradient     the rest, of those that this rank alone has, which `own` tells by their names
    optimizer        AdamW over the trained masters; only matrices decay
    """

    def __init__(
        self,
        copies: Mapping[str, torch.nn.Parameter],
        initial: Mapping[str, Tensor],
        training: TrainingRecipe,
        device: torch.device,
        own: Callable[[str], bool] = lambda name: False,
    ) -> None:
        self.copies = dict(sorted(copies.items(), key=lambda item: own(item[0])))
        self._masters = {name: initial[name].to(device) for name in self.copies}
        trained = {
            name: master
            for name, master in self._masters.items()
            if self.copies[name].requires_grad
        }
        sizes = [master.numel() for master in trained.values()]
        self.gradient = torch.zeros(sum(sizes), device=device)
        shared = sum(master.numel() for name, master in trained.items() if not own(name))
        self.shared_gradient = self.gradient[:shared]
        self.own_gradient = self.gradient[shared:]
        self._is_own = own
        self._gradients: dict[str, Tensor] = {}
        parts = torch.split(self.gradient, sizes)
        for (name, master), part in zip(trained.items(), parts, strict=True):
            self._gradients[name] = part.view_as(master)
            master.grad = self._gradients[name]
        self.optimizer = _adamw(trained.values(), training)
        self.round()

    @property
    def nbytes(self) -> int:
        """Of copies, masters, gradients and moments, whether these are there yet or not."""
        frozen = sum(x.nbytes + self._masters[name].nbytes for name, x in self.copies.items())
        return frozen + 3 * self.gradient.nbytes

    @torch.no_grad()
    def round(self) -> None:
        """Make the copies what the masters are, rounded to the copies' dtype."""
        masters = [self._masters[name] for name in self.copies]
        torch._foreach_copy_(list(self.copies.values()), masters)

    def take_gradients(self) -> None:
        """Add to `gradient` what a backward pass left at the copies, and clear it there."""
        sums: list[Tensor] = []
        parts: list[Tensor] = []
        for name, gradient in self._gradients.items():
            copy = self.copies[name]
            if copy.grad is not None:
                sums.append(gradient)
                parts.append(copy.grad)
            copy.grad = None
        if parts:
            torch._foreach_add_(sums, parts)

    def update(self, rate: float) -> None:
        """One step of AdamW along `gradient`."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()

    def move_biases(self, counts_SE: Tensor, rate: float) -> None:
        """Move the routers' selection biases, where they have any, towards an even load."""
        biases = [m for name, m in self._masters.items() if name.endswith(SELECTION_BIAS)]
        for bias_E, counts_E in zip(biases, counts_SE, strict=False):
            bias_E.copy_(updated_bias(bias_E, counts_E, rate))

    def broken_gradients(self) -> list[str]:
        """The names of weights whose gradient is not finite, those nearest to the loss first."""
        named = reversed(self._gradients.items())
        return [name for name, gradient in named if not gradient.isfinite().all()]

    def digest(self) -> str:
        """Of the masters that all ranks have."""
        found = hashlib.sha256()
        for name, master in self._masters.items():
            if not self._is_own(name):
                found.update(master.reshape(-1).cpu().numpy().data)
        return found.hexdigest()

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Masters and both moments by name: all that an update depends on, beside the step."""
        moments: dict[str, dict[str, Tensor]] = {"mean": {}, "square": {}}
        for name in self._gradients:
            master = self._masters[name]
            state = self.optimizer.state.get(master) or {}
            for kind, key in _MOMENTS.items():
                moments[kind][name] = state.get(key, torch.zeros_like(master))
        return {"master": dict(self._masters), **moments}

    def restore(self, state: Mapping[str, Mapping[str, Tensor]], step: int) -> None:
        """Become what had this state after so many steps."""
        for name, master in self._masters.items():
            master.copy_(state["master"][name])
        for name in self._gradients:
            master = self._masters[name]
            moments = {key: state[kind][name].to(master.device) for kind, key in _MOMENTS.items()}
            step_so_far = torch.tensor(float(step), device=master.device)
            self.optimizer.state[master] = {"step": step_so_far, **moments}
        self.round()


def squared_norm(vector: Tensor) -> Tensor:
    """In float64. Over blocks first: torch adds up so many squares in float32, and would be off by
    some of the digits that ranks are compared in."""
    whole = len(vector) // _BLOCK * _BLOCK
    blocks = torch.linalg.vector_norm(vector[:whole].view(-1, _BLOCK), dim=1)
    rest = torch.linalg.vector_norm(vector[whole:])
    squares: Tensor = blocks.double().square().sum() + rest.double().square()
    return squares


def _adamw(masters: Iterable[Tensor], training: TrainingRecipe) -> torch.optim.AdamW:
    """The optimiser over two groups of weights: matrices, which decay, and all others."""
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for master in masters:
        (matrices if master.ndim >= 2 else others).append(master)
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": training.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    filled = [group for group in groups if group["params"]]
    return torch.optim.AdamW(filled, lr=0.0, betas=(training.beta1, training.beta2), fused=True)
