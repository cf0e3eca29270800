"""What a backend makes for itself and others only hand back to it: opaque, but not untyped."""

from typing import TypeVar


class PreparedLinear:
    """Linear layers of one input, as the backend that made it wants them."""

    __slots__ = ()


class PreparedExperts:
    """One layer's experts, as the backend that made it wants them."""

    __slots__ = ()


class LayerCache:
    """One layer's keys and values, in the layout of the backend that made it."""

    __slots__ = ()


class AttentionPlan:
    """What layers with the same window need to know of a step to attend."""

    __slots__ = ()


_Own = TypeVar("_Own")


def own(handle: object, kind: type[_Own]) -> _Own:
    """`handle`, which must be of this backend's `kind`. Raises TypeError for another's."""
    if not isinstance(handle, kind):
        raise TypeError(
            f"{type(handle).__name__} was made by another backend; this one takes {kind.__name__}"
        )
    return handle
