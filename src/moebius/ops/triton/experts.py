"""Experts by Triton kernels: a grouped feed-forward over rows that are sorted by expert."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from moebius.ops.capability import Operation
from moebius.ops.config import Activation, ClampedSwiGLU
from moebius.ops.formats import dtype_name
from moebius.ops.prepared import PreparedExperts, own
from moebius.ops.reference.experts import ReferenceExperts
from moebius.ops.steps import ExpertWeights
from moebius.ops.triton.kernels import experts as kernels
from moebius.ops.triton.linear import DTYPE_OF
from moebius.ops.triton.tiles import ManyRows, SizedOps, Tile, enough, tiles_for
from moebius.ops.triton.weights import (
    DTYPES,
    PLAIN,
    Held,
    Stored,
    addresses,
    common,
    computed_in,
    one_device,
    trained,
)
from moebius.ops.weights import Weight

OPERATIONS = frozenset({Operation.EXPERTS, Operation.EXPERT_ROWS, Operation.COMBINE})

# Choices that are looked at in one step of a sort, and columns of a sum.
SORTED = 1024
SUMMED = 1024


@dataclass(frozen=True, slots=True, eq=False)
class TritonExperts(PreparedExperts):
    """One layer's experts: a table of addresses (E, 9), int64, and what lies there.

    plain          the same for plain PyTorch
    inner, outer   how gate and up are stored, and how down
    bias           the dtype of all biases, empty for none
    missing        the experts that are held elsewhere
    """

    plain: ReferenceExperts
    table: Tensor
    inner: Stored
    outer: Stored
    bias: str
    hidden: int
    width: int
    missing: tuple[int, ...]
    held: Held

    def is_of(self, weights: ExpertWeights) -> bool:
        return self.held.is_of(weights.tensors())


@dataclass(frozen=True, slots=True, eq=False)
class _Sorted:
    """Choices by expert: `order` holds their numbers, those of expert e from starts[e] on."""

    order: Tensor
    starts: Tensor


class ExpertOps(SizedOps):
    """Experts whose weights are in formats of weights.READ, one for gate and up and one for down;
    others, and those that are trained, plain PyTorch widens for each product."""

    def prepare_experts(
        self,
        weights: ExpertWeights,
        activation: Activation,
        dtype: torch.dtype | None = None,
        *,
        on_disk: bool = False,
    ) -> PreparedExperts:
        plain = own(super().prepare_experts(weights, activation, dtype), ReferenceExperts)
        missing = tuple(e for e, weight in enumerate(weights.gate_FD) if weight is None)
        if len(missing) == len(weights.gate_FD):
            raise ValueError("none of a layer's experts is held here; a rank needs at least one")
        tensors = weights.tensors()
        device = one_device(tensors)
        _check_shapes(weights)
        inner = common(_held([*weights.gate_FD, *weights.up_FD]))
        outer = common(_held(weights.down_DF))
        bias = _bias(weights)
        if device is None or trained(tensors) or inner is None or outer is None or bias is None:
            return plain
        width, hidden = _held(weights.gate_FD)[0].shape
        table = _table(weights).to(device)
        return TritonExperts(
            plain, table, inner, outer, bias, hidden, width, missing, Held.of(tensors)
        )

    def experts(
        self,
        x_TD: Tensor,
        weights_TK: Tensor | None,
        expert_ids_TK: Tensor | None,
        experts: PreparedExperts,
    ) -> Tensor:
        if _is_plain(x_TD, experts):
            return super().experts(x_TD, weights_TK, expert_ids_TK, _plain(experts))
        prepared = _own(experts, x_TD)
        if weights_TK is None or expert_ids_TK is None:
            return self._feed_forward(x_TD, prepared, None, 1)
        rows_TKD = self._chosen(x_TD, expert_ids_TK, prepared, drops=False)
        return self.combine(rows_TKD, weights_TK)

    def expert_rows(self, x_RD: Tensor, expert_ids_RK: Tensor, experts: PreparedExperts) -> Tensor:
        if _is_plain(x_RD, experts):
            return super().expert_rows(x_RD, expert_ids_RK, _plain(experts))
        return self._chosen(x_RD, expert_ids_RK, _own(experts, x_RD), drops=True)

    def combine(self, x_TKD: Tensor, weights_TK: Tensor) -> Tensor:
        if x_TKD.dtype not in DTYPES or trained([x_TKD, weights_TK]):
            return super().combine(x_TKD, weights_TK)
        rows, top_k, size = x_TKD.shape
        if weights_TK.shape != (rows, top_k):
            raise ValueError(
                f"weights of experts have the shape {tuple(weights_TK.shape)}, not {(rows, top_k)}"
            )
        out = torch.empty((rows, size), dtype=x_TKD.dtype, device=x_TKD.device)
        if out.numel():
            kernels.combine[(rows, triton.cdiv(size, SUMMED))](
                x_TKD.contiguous(), weights_TK.contiguous(), out, top_k, size, BLOCK=SUMMED
            )
        return out

    def _chosen(
        self, x_TD: Tensor, ids_TK: Tensor, prepared: TritonExperts, *, drops: bool
    ) -> Tensor:
        """Each choice's output (T, K, D). drops: an id of E stands for none, whose row holds
        anything."""
        top_k = ids_TK.shape[1]
        order = _sort(ids_TK, len(prepared.table))
        if self.looks():
            _require_held(ids_TK, order, prepared, drops=drops)
        rows_PD = self._feed_forward(x_TD, prepared, order, top_k)
        return rows_PD.view(len(x_TD), top_k, prepared.hidden)

    def _feed_forward(
        self, x_TD: Tensor, prepared: TritonExperts, order: _Sorted | None, top_k: int
    ) -> Tensor:
        """The rows of all choices, or without an order of each row's only one: (T * K, D)."""
        rows = len(x_TD) * top_k
        inner = torch.empty((rows, prepared.width), dtype=x_TD.dtype, device=x_TD.device)
        out = torch.empty((rows, prepared.hidden), dtype=x_TD.dtype, device=x_TD.device)
        if rows:
            x = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
            tiles = _tiles(rows, x.dtype, prepared, order is not None, self.many_rows)
            _gate_up(x, inner, prepared, _Launch.of(rows, tiles[0], prepared, order), top_k)
            _down(inner, out, prepared, _Launch.of(rows, tiles[1], prepared, order))
        return out


@dataclass(frozen=True, slots=True, eq=False)
class _Launch:
    """What a product of a feed-forward is launched with.

    tiles            of rows, the most that there may be
    tile             what they are computed with
    starts, places   as in _Sorted; what is not read where there is nothing to sort
    """

    rows: int
    tiles: int
    starts: Tensor
    places: Tensor
    tile: Tile
    constants: dict[str, object]

    @classmethod
    def of(cls, rows: int, tile: Tile, prepared: TritonExperts, order: _Sorted | None) -> "_Launch":
        constants = {
            "BIAS": prepared.bias,
            "ROUTED": order is not None,
            "EXPERTS": triton.next_power_of_2(len(prepared.table)),
            "M": tile.rows,
            "N": tile.columns,
            "K": tile.depth,
            "num_warps": tile.warps,
            "num_stages": tile.stages,
        }
        if order is None:
            tiles = triton.cdiv(rows, tile.rows)
            return cls(rows, tiles, prepared.table, prepared.table, tile, constants)
        # Each expert's last tile may hold but one row.
        tiles = min(rows, rows // tile.rows + len(prepared.table))
        return cls(rows, tiles, order.starts, order.order, tile, constants)


def _tiles(
    rows: int, dtype: torch.dtype, prepared: TritonExperts, routed: bool, when: ManyRows
) -> tuple[Tile, Tile]:
    """Those of gate and up, of whose weights a step has two tiles, and those of down."""
    device = prepared.table.device
    sizes = tiles_for(device)
    share = rows // len(prepared.table) if routed else rows

    def sized(codes: bool, width: int, sums: int) -> Tile:
        few = sizes.sized(many=False, codes=codes, sums=sums)
        many = sizes.sized(many=True, codes=codes, sums=sums)
        tiles = rows // many.rows * triton.cdiv(width, many.columns)
        fits = dtype.itemsize == 2 and enough(tiles, share / many.rows, device, when)
        return many if fits else few

    inner = sized(prepared.inner.codes, prepared.width, 2)
    if inner.rows == sizes.few.rows:
        # With a tile of weights more, a step fewer is on its way.
        inner = inner._replace(stages=max(2, inner.stages - 1))
    return inner, sized(prepared.outer.codes, prepared.hidden, 1)


def _gate_up(
    x: Tensor, inner: Tensor, prepared: TritonExperts, launch: _Launch, top_k: int
) -> None:
    weights = prepared.plain.weights
    activation = prepared.plain.activation
    clamped = isinstance(activation, ClampedSwiGLU)
    kernels.gate_up[(launch.tiles, triton.cdiv(prepared.width, launch.tile.columns))](
        x,
        prepared.table,
        launch.starts,
        launch.places,
        inner,
        launch.rows,
        len(prepared.table),
        top_k,
        prepared.hidden,
        prepared.width,
        x.stride(0),
        prepared.inner.stride,
        prepared.inner.scale_stride,
        activation.alpha if isinstance(activation, ClampedSwiGLU) else 0.0,
        activation.limit if isinstance(activation, ClampedSwiGLU) else 0.0,
        **prepared.inner.constants(),
        DTYPE=DTYPE_OF[computed_in(x.dtype, _held(weights.gate_FD)[0], wide=False)],
        ACTIVATION="clamped_swiglu" if clamped else activation,
        UP=bool(weights.up_FD),
        **launch.constants,
    )


def _down(inner: Tensor, out: Tensor, prepared: TritonExperts, launch: _Launch) -> None:
    weight = _held(prepared.plain.weights.down_DF)[0]
    kernels.down[(launch.tiles, triton.cdiv(prepared.hidden, launch.tile.columns))](
        inner,
        prepared.table,
        launch.starts,
        launch.places,
        out,
        launch.rows,
        len(prepared.table),
        prepared.hidden,
        prepared.width,
        prepared.outer.stride,
        prepared.outer.scale_stride,
        **prepared.outer.constants(),
        DTYPE=DTYPE_OF[computed_in(inner.dtype, weight, wide=False)],
        **launch.constants,
    )


def _held(weights: Sequence[Weight | None]) -> list[Weight]:
    return [weight for weight in weights if weight is not None]


def _is_plain(x: Tensor, experts: PreparedExperts) -> bool:
    """Whether plain PyTorch computes these rows' experts."""
    return isinstance(experts, ReferenceExperts) or x.dtype not in DTYPES or trained([x])


def _plain(experts: PreparedExperts) -> PreparedExperts:
    return experts.plain if isinstance(experts, TritonExperts) else experts


def _own(experts: PreparedExperts, x: Tensor) -> TritonExperts:
    prepared = own(experts, TritonExperts)
    if x.shape[1:] != (prepared.hidden,):
        raise ValueError(f"rows for experts have {prepared.hidden} numbers, not {x.shape[1:]}")
    return prepared


def _check_shapes(weights: ExpertWeights) -> None:
    """Raises ValueError for what the kernels would read beyond its end."""
    width, hidden = _held(weights.gate_FD)[0].shape
    count = len(weights.gate_FD)
    sizes = ((width, hidden), (width, hidden), (hidden, width), (width,), (width,), (hidden,))
    for kind, shape in zip(weights, sizes, strict=True):
        if len(kind) not in (0, count):
            raise ValueError(f"there are {count} experts, and {len(kind)} of one of their parts")
        for each in kind:
            if each is not None and tuple(each.shape) != shape:
                raise ValueError(f"a part of an expert is {tuple(each.shape)}, not {shape}")


def _bias(weights: ExpertWeights) -> str | None:
    """The dtype of all biases, empty for none; None where there are several, or only some."""
    kinds = (weights.gate_bias_F, weights.up_bias_F, weights.down_bias_D)
    found = {bias.dtype for kind in kinds for bias in kind if bias is not None}
    if not found:
        return ""
    wanted = kinds if weights.up_FD else (kinds[0], kinds[2])
    whole = all(wanted) and all(
        bias is not None and bias.is_contiguous()
        for kind in wanted
        for bias, weight in zip(kind, weights.gate_FD, strict=True)
        if weight is not None
    )
    dtype = found.pop()
    return dtype_name(dtype) if whole and not found and dtype in PLAIN else None


def _table(weights: ExpertWeights) -> Tensor:
    """Of each expert the addresses of its planes and biases, in the kernels' order."""
    count = len(weights.gate_FD)
    columns: list[Sequence[int]] = []
    for kind in (weights.gate_FD, weights.up_FD, weights.down_DF):
        pairs = [addresses(weight) for weight in kind] or [(0, 0)] * count
        columns += zip(*pairs, strict=True)
    for biases in (weights.gate_bias_F, weights.up_bias_F, weights.down_bias_D):
        columns.append([_place(bias) for bias in biases] or [0] * count)
    return torch.tensor(columns, dtype=torch.int64).t().contiguous()


def _place(bias: Tensor | None) -> int:
    return 0 if bias is None else bias.data_ptr()


def _sort(ids_TK: Tensor, experts: int) -> _Sorted:
    ids = ids_TK.reshape(-1)
    order = torch.empty(len(ids), dtype=torch.int32, device=ids.device)
    starts = torch.empty(experts + 1, dtype=torch.int32, device=ids.device)
    kernels.sort[(experts + 1,)](ids, order, starts, len(ids), BLOCK=SORTED)
    return _Sorted(order, starts)


def _require_held(ids_TK: Tensor, order: _Sorted, prepared: TritonExperts, *, drops: bool) -> None:
    """Raises IndexError for an id that is no expert's, or a hole's."""
    starts = order.starts.tolist()
    count = len(prepared.table)
    none = ids_TK.numel() - starts[-1]
    if drops and none:
        none = int((ids_TK > count).sum())
    if starts[0] or none:
        wrong = int(ids_TK.min()) if starts[0] else int(ids_TK.max())
        raise IndexError(f"expert id {wrong} is none of {count}")
    for e in prepared.missing:
        if starts[e] != starts[e + 1]:
            raise IndexError(f"expert {e} is not held here")
