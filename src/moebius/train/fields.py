"""Kinds of values in a recipe, each with what it must be: a record is checked against its own annotations."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from moebius.config import require


@dataclass(frozen=True, slots=True)
class Must:
    """`holds` is what the words say."""

    words: str
    holds: Callable[[Any], bool]


Count = Annotated[int, Must("be at least 1", lambda x: x >= 1)]
Natural = Annotated[int, Must("not be negative", lambda x: x >= 0)]
Width = Annotated[int, Must("be a multiple of 8, which grouped products need", lambda x: x >= 0 and x % 8 == 0)]
Positive = Annotated[float, Must("be a positive number", lambda x: 0 < x < math.inf)]
Weight = Annotated[float, Must("not be negative", lambda x: 0 <= x < math.inf)]
Share = Annotated[float, Must("lie between 0 and 1", lambda x: 0 <= x <= 1)]
Below1 = Annotated[float, Must("be at least 0 and less than 1", lambda x: 0 <= x < 1)]


def check(table: str, record: object) -> None:
    """ConfigError for the first field whose value is not what its annotation says."""
    for name, kind in get_type_hints(type(record), include_extras=True).items():
        value = getattr(record, name)
        if get_origin(kind) is Annotated:
            must = kind.__metadata__[0]
            require(must.holds(value), f"{table}.{name} is {value}; it must {must.words}")
        elif get_origin(kind) is Literal:
            known = ", ".join(filter(None, get_args(kind)))
            require(value in get_args(kind), f"{table}.{name} is {value!r}; it must be one of {known}")
