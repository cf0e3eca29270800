"""How sizes and places are said to a person."""

import re
from collections.abc import Sequence


def human_bytes(count: int) -> str:
    """1536 -> '1.5 KiB'."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def node_names(nodes: Sequence[int]) -> str:
    """(1,) -> 'memory node 1'."""
    numbers = ", ".join(map(str, nodes))
    return f"memory node{'s' * (len(nodes) > 1)} {numbers}"


def bytes_of(text: str) -> int:
    """'24GiB' -> 25769803776: a number with B, KiB, MiB, GiB or TiB behind it, or KB to TB, which
    are powers of 1,000. Raises ValueError."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([KMGT]i?)?B?", text.strip())
    if found is None:
        raise ValueError(f"{text!r} is no size; write it as 24GiB or 24000MB")
    number, unit = found.groups()
    power = "KMGT".index(unit[0]) + 1 if unit else 0
    base = 1000 if unit and len(unit) == 1 else 1024
    return int(float(number) * base**power)
