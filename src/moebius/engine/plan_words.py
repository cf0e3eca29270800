"""How sizes and places are said to a person."""

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
