"""Embedding, linear layers and norms: parameters, and the backend's operation on them."""

from collections.abc import Callable, Container
from typing import Self

import torch
from torch import Tensor, nn

from moebius.ops import Matrix, Ops, PreparedLinear, Weight


class Changes:
    """How often a parameter became another one, or lies elsewhere."""

    def __init__(self) -> None:
        self.count = 0


class ParameterModule(nn.Module):
    """A module with parameters of its own. `changes` counts what becomes of them: what was recorded
    of a model's parameters before is of others."""

    changes = Changes()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        self.changes.count += 1
        super().register_parameter(name, param)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.changes.count += 1
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


class Weighted(ParameterModule):
    """A module with a `weight` (O, I): a parameter, or a matrix that no parameter can hold.

    Training has parameters alone. To serve, a weight in a format of several planes takes the
    parameter's place (`hold`); one of plain numbers is a parameter of its own dtype, whatever the
    module computes in.
    """

    weight: nn.Parameter

    def __init__(self, rows: int, columns: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns, dtype=dtype))
        self._matrix: Matrix | None = None

    def hold(self, matrix: Matrix) -> None:
        """Compute with `matrix` in place of the parameter. Raises ValueError for another shape."""
        _require_shape(matrix, self.held())
        self._matrix = matrix
        self.register_parameter("weight", None)

    def held(self) -> Weight:
        """What is computed with."""
        return self.weight if self._matrix is None else self._matrix

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if self._matrix is not None:
            self._matrix = self._matrix.moved(fn)
        return self


class WeightList(ParameterModule, nn.ParameterList):
    """`count` weights, each a parameter or, to serve, a matrix: see Weighted.

    Of those that are not in `held` (None: all are) there is the number and nothing else: a hole.
    """

    def __init__(
        self, count: int, *shape: int, dtype: torch.dtype, held: Container[int] | None = None
    ) -> None:
        super().__init__()
        self._size = count
        self._matrices: dict[str, Matrix] = {}
        # Those without memory, which a model to be loaded has thousands of, are made at once.
        bare = torch.get_default_device().type == "meta"
        made = torch.empty(count, *shape, dtype=dtype).unbind() if bare else ()
        for index in range(count):
            self._set(str(index), None)
            if held is None or index in held:
                weight = made[index] if bare else torch.empty(*shape, dtype=dtype)
                self._set(str(index), nn.Parameter(weight))

    def _set(self, name: str, weight: nn.Parameter | None) -> None:
        """register_parameter without its checks, which take longer than all else of a load."""
        self.changes.count += 1
        self._parameters[name] = weight

    def hold(self, index: int, matrix: Matrix | None) -> None:
        """Compute with `matrix`, ValueError for another shape; None makes a hole."""
        name = str(index)
        weight = self._matrices.get(name, self._parameters[name])
        if matrix is not None and weight is not None:
            _require_shape(matrix, weight)
        self._set(name, None)
        self._matrices.pop(name, None)
        if matrix is not None:
            self._matrices[name] = matrix

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._matrices = {name: matrix.moved(fn) for name, matrix in self._matrices.items()}
        return self

    def held(self) -> tuple[Weight | None, ...]:
        """What is computed with; ParameterList's own indexing costs a millisecond a hundred."""
        if not self._matrices:
            return self.vectors()
        return tuple(self._matrices.get(name, x) for name, x in self._parameters.items())

    def vectors(self) -> tuple[Tensor | None, ...]:
        """The same where no matrix takes a parameter's place."""
        return tuple(self._parameters.values())


def _require_shape(matrix: Matrix, weight: Weight) -> None:
    if matrix.shape != weight.shape:
        raise ValueError(f"a matrix {matrix.shape} where there is a weight {tuple(weight.shape)}")


class Embedding(Weighted):
    """A row of weight (V, D) for each id."""

    def __init__(self, ops: Ops, count: int, size: int, *, dtype: torch.dtype) -> None:
        super().__init__(count, size, dtype)
        self.ops = ops

    def forward(self, ids_T: Tensor, multiplier: float, dtype: torch.dtype) -> Tensor:
        """multiplier * weight[ids], (T, D) of `dtype`."""
        return self.ops.embed(ids_T, self.held(), multiplier, dtype)


class Linear(Weighted):
    """y = x W^T + b with weight (O, I) and, where asked for, bias (O,)."""

    def __init__(
        self, ops: Ops, in_size: int, out_size: int, *, bias: bool = False, dtype: torch.dtype
    ) -> None:
        super().__init__(out_size, in_size, dtype)
        self.ops = ops
        self.bias = nn.Parameter(torch.empty(out_size, dtype=dtype)) if bias else None
        self._prepared: PreparedLinear | None = None

    def prepared(self, dtype: torch.dtype) -> PreparedLinear:
        """The backend's handle for inputs of `dtype`.

        Made at first use, and anew where a parameter is another since.
        """
        layer = (self.held(), self.bias)
        if self._prepared is None or not self._prepared.is_of(layer):
            self._prepared = self.ops.prepare_linear(layer, dtype=dtype)
        return self._prepared

    def forward(self, x_TI: Tensor) -> Tensor:
        return self.ops.linear(x_TI, self.prepared(x_TI.dtype))

    def logits(self, x_TI: Tensor) -> Tensor:
        """In float32, never rounded."""
        return self.ops.logits(x_TI, self.prepared(x_TI.dtype))


class RMSNorm(ParameterModule):
    """Root-mean-square norm over the last dimension (arXiv 1910.07467).

    dtype: the weight's, which the product with it is rounded as: see Ops.rms_norm.
    less_mean: a layer norm.
    """

    def __init__(
        self, ops: Ops, size: int, eps: float, *, dtype: torch.dtype, less_mean: bool = False
    ) -> None:
        super().__init__()
        self.ops = ops
        self.eps = eps
        self.less_mean = less_mean
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.rms_norm(x, self.weight, self.eps, less_mean=self.less_mean)

    def add(
        self, x: Tensor, update: Tensor | None, multiplier: float, scale: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """scale * (x + multiplier * update), x without an update: the stream, and its norm."""
        if update is None:
            return x, self(x)
        return self.ops.add_rms_norm(
            x, update, multiplier, self.weight, self.eps, less_mean=self.less_mean, scale_1=scale
        )
