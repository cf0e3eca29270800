"""What the readers of all methods share: keys, lists of names, words."""

from collections.abc import Mapping, Sequence
from typing import Any

from moebius.models.reading import ConfigReader, Keys

# Names by which safetensors files call plain numbers that may be scales.
PLAIN_SCALES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def opened(
    raw: Mapping[str, Any], read: Mapping[str, Any], harmless: Sequence[str], where: str
) -> ConfigReader:
    """A reader of an object, for which every key that is in neither list counts.

    read: keys with what their absence means. harmless: keys that change no number.
    """
    reader = ConfigReader(raw, Keys(read, closed=True), f"{where}: ")
    reader.computed |= {"quant_method", *harmless}
    return reader


def names(reader: ConfigReader, key: str) -> tuple[str, ...]:
    """A list of names; none where it is null or absent."""
    value = reader.get(key)
    value = [] if value is None else value
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise reader.error(f"{key} is {value!r}; it must be a list of names")
    return tuple(each for each in value if each)


def word(reader: ConfigReader, key: str, known: Sequence[str]) -> str:
    """One of the known words, in whatever case."""
    value = reader.get(key)
    if not isinstance(value, str) or value.lower() not in known:
        raise reader.error(f"{key} is {value!r}; supported are {', '.join(known)}")
    return value.lower()


def block_size(reader: ConfigReader, key: str) -> tuple[int, int]:
    """Rows and columns that share a scale; as older files write them, "128x128", too."""
    value = reader.get(key)
    sizes = value
    if isinstance(value, str):
        sizes = [int(size) if size.isdecimal() else 0 for size in value.split("x")]
    good = (
        isinstance(sizes, list)
        and len(sizes) == 2
        and all(type(size) is int and size > 0 for size in sizes)
    )
    if not good:
        raise reader.error(f"{key} is {value!r}; it must be two positive integers")
    return sizes[0], sizes[1]


def group_size(reader: ConfigReader, key: str = "group_size") -> int:
    """Columns that share a scale, a multiple of 8; -1 is the whole row, which is 0 here."""
    value = reader.get(key)
    if value == -1:
        return 0
    size = reader.integer(key)
    if size % 8:
        raise reader.error(f"{key} is {size}; it must be a multiple of 8, or -1 for whole rows")
    return size
