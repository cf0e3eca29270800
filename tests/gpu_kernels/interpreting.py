"""Triton's interpreter, made quicker where it does the same work again and again.

Half of its time goes into describing types: each operation on a tile makes the tile's type anew,
the shape as constants, and a table of NumPy's dtypes. Types never change, so one of each will do.
Nor does what stands for the language's functions, which it looks for at each launch and at each call
of one function by another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

EXACT = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


@contextmanager
def hurrying() -> Iterator[None]:
    """Within it the interpreter hurries; within another one it does already.

    To be left when all is over: a class does not take its own `__new__` back.
    """
    if interpreter._get_np_dtype.__module__ == __name__:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        hurry(patch)
        yield


def sum_in_order(patch: pytest.MonkeyPatch) -> None:
    """Products as a GPU's: what a row of a tile gives does not depend on its place in it, as in
    NumPy's."""

    def create_dot(_: Any, a: Any, b: Any, acc: Any, *options: Any) -> Any:
        products = a.data[:, :, None] * b.data[None, :, :]
        return interpreter.TensorHandle(products.sum(1) + acc.data, acc.dtype.scalar)

    patch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def hurry(patch: pytest.MonkeyPatch) -> None:
    remember_types(patch)
    compare_at_once(patch)
    replace_once(patch)


def remember_types(patch: pytest.MonkeyPatch) -> None:
    """One object for each type of a tile, with what tensors of it have as their shape; and NumPy's
    dtype of each scalar type."""
    made: dict[tuple[Any, ...], core.block_type] = {}
    shapes: dict[tuple[int, ...], tuple[Any, Any]] = {}
    dtypes: dict[str, np.dtype[Any]] = {}
    describe = core.block_type.__init__
    dtype_of = interpreter._get_np_dtype

    def one_of_each(cls: type, element_ty: core.dtype, shape: Any) -> core.block_type:
        sizes = [size.value if isinstance(size, core.constexpr) else size for size in shape]
        key = (element_ty.name, *sizes)
        found = made.get(key)
        if found is None:
            found = object.__new__(cls)
            describe(found, element_ty, sizes)
            made[key] = found
        return found

    def shape_of(sizes: tuple[int, ...]) -> tuple[Any, Any]:
        if sizes not in shapes:
            constants = core.tuple([core.constexpr(size) for size in sizes])
            shapes[sizes] = (constants, core.constexpr(math.prod(sizes)))
        return shapes[sizes]

    def of_type(self: core.tensor, handle: Any, type: core.dtype) -> None:
        self.handle = handle
        self.type = type
        self.dtype = type.scalar
        self.shape, self.numel = shape_of(tuple(type.shape) if type.is_block() else ())

    def remembered(tt_dtype: core.dtype) -> np.dtype[Any]:
        name = tt_dtype.scalar.name
        if name not in dtypes:
            dtypes[name] = dtype_of(tt_dtype)
        return dtypes[name]

    patch.setattr(core.block_type, "__new__", one_of_each)
    patch.setattr(core.block_type, "__init__", lambda self, element_ty, shape: None)
    patch.setattr(core.tensor, "__init__", of_type)
    patch.setattr(interpreter, "_get_np_dtype", remembered)


def compare_at_once(patch: pytest.MonkeyPatch) -> None:
    """Whether integers overflow is asked of NumPy, in 64 bits, and not by five operations more of
    the language; and tiles of one shape are not brought to one shape."""
    bring_together = TritonSemantic.broadcast_impl_value

    def overflow(self: TritonSemantic, lhs: Any, rhs: Any, operation: Any) -> None:
        kind = lhs.type.scalar
        if kind.int_bitwidth >= 64:
            return
        exact = EXACT[operation.__name__](
            lhs.handle.data.astype(np.int64), rhs.handle.data.astype(np.int64)
        )
        least, most = kind.get_int_min_value(), kind.get_int_max_value()
        assert exact.min() >= least and exact.max() <= most, (
            f"{kind} overflow detected for operation {operation.__name__}"
        )

    def together(self: TritonSemantic, lhs: Any, rhs: Any) -> tuple[Any, Any]:
        tiles = lhs.type.is_block() and rhs.type.is_block()
        if tiles and lhs.type.shape.values == rhs.type.shape.values:
            return lhs, rhs
        return bring_together(self, lhs, rhs)

    patch.setattr(TritonSemantic, "binary_op_sanitize_overflow_impl", overflow)
    patch.setattr(TritonSemantic, "broadcast_impl_value", together)


def replace_once(patch: pytest.MonkeyPatch) -> None:
    """The language's functions are replaced by the interpreter's once for each module of kernels, and
    stay so; and they are called without a look at what they are called with."""
    replace = interpreter._patch_lang
    seen: set[str] = set()

    def once(fn: Any) -> Any:
        if fn.__module__ not in seen:
            replace(fn)
            seen.add(fn.__module__)
        return interpreter._LangPatchScope()  # of which nothing is to be restored

    def replace_one(obj: object, name: str, member: Any, builder: object, scope: Any) -> None:
        function: Callable[..., Any] = getattr(member, "__wrapped__", member)

        def called(*args: Any, **kwargs: Any) -> Any:
            kwargs["_semantic"] = interpreter.interpreter_semantic
            return function(*args, **kwargs)

        scope.set_attr(obj, name, called)

    patch.setattr(interpreter, "_patch_lang", once)
    patch.setattr(interpreter, "_patch_attr", replace_one)
