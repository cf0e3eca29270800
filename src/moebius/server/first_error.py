"""What pydantic finds wrong with a body, in the words of a client's fields."""

import re
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from moebius.errors import RequestError

Location = tuple[int | str, ...]

_MESSAGES = {
    "missing": "this field is required",
    "extra_forbidden": "there is no such field",
    "model_type": "Input should be an object",
}
_EXPECTED = "Input should be "
# Where a field may be of several types, pydantic tells each one's error, and puts its name, such as
# `str` or `list[int]`, behind the field's.
_BRANCH = re.compile(r"str|bool|int|float|\w+\[.*\]", re.DOTALL)


def first_error(error: ValidationError) -> RequestError:
    """What is wrong with the first wrong field, and its name."""
    errors: list[Any] = error.errors(include_url=False, include_input=False)
    first = errors[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, RequestError):
        return cause
    location, message = _of_branches(errors) or (first["loc"], first["msg"])
    param = _path(location)
    message = _MESSAGES.get(first["type"], message).replace("a valid dictionary", "an object")
    return RequestError(f"{param}: {message}".removeprefix(": "), param=param)


def _of_branches(errors: Sequence[Any]) -> tuple[Location, str] | None:
    """What is wrong with a field of several types; None where the first wrong one has one type.

    What is wrong inside of a value says more than what else the value might have been.
    """
    location: Location = errors[0]["loc"]
    at = next((i for i, part in enumerate(location) if _is_branch(part)), None)
    if at is None or not errors[0]["msg"].startswith(_EXPECTED):
        return None
    branches = [each for each in errors if each["loc"][:at] == location[:at]]
    inside = next((each for each in branches if len(each["loc"]) > at + 1), None)
    if inside is not None:
        return location[:at] + inside["loc"][at + 1 :], inside["msg"]
    wanted = dict.fromkeys(each["msg"].removeprefix(_EXPECTED) for each in branches)
    return location[:at], _EXPECTED + " or ".join(wanted)


def _is_branch(part: int | str) -> bool:
    return isinstance(part, str) and _BRANCH.fullmatch(part) is not None


def _path(location: Sequence[int | str]) -> str:
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in location]
    return "".join(parts).removeprefix(".")
