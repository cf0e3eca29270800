"""A call's arguments as the object that they are the JSON text of."""

from typing import Any

from pydantic_core import from_json


def object_of(arguments: str) -> dict[str, Any]:
    """Of those that were cut off, what is whole of them, as Anthropic's own clients read a stream;
    nothing of what is no object."""
    try:
        found = from_json(arguments or "{}", allow_partial=True)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
