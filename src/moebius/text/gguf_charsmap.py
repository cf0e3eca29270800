"""SentencePiece's precompiled character map, held against its own size before it is used.

u32 bytes of a double array (darts-clone's), the array of u32 units, then the replacements, each
with a zero behind it. The tokenizers library follows a map's numbers without looking, and panics
where they lead outside.

Source: https://github.com/s-yata/darts-clone (darts.h, the unit's layout).
"""

import struct

from tokenizers import normalizers

from moebius.errors import TokenizerError

_U32 = struct.Struct("<I")
_BLOCK = 255  # what a byte can change in the place of a unit
_IS_VALUE = 1 << 31
_HAS_LEAF = 1 << 8


def charsmap_normalizer(octets: bytes, key: str) -> normalizers.Normalizer:
    """The normaliser of a character map. Raises TokenizerError naming the key."""
    size = _U32.unpack_from(octets)[0] if len(octets) >= _U32.size else 0
    start = _U32.size
    if size % _U32.size or not 0 < size <= len(octets) - start:
        raise TokenizerError(
            f"{key} has {len(octets)} bytes, of which {size} are to be its array of words"
        )
    units = struct.unpack_from(f"<{size // _U32.size}I", octets, start)
    replacements = octets[start + size :]
    if not _inside(units, replacements):
        raise TokenizerError(f"{key} is damaged: its array leads outside of itself")
    try:
        return normalizers.Precompiled(octets)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise TokenizerError(f"{key} is no character map: {error}") from error


def _inside(units: tuple[int, ...], replacements: bytes) -> bool:
    """Whether every step from one unit to another, and to a replacement, stays inside."""
    for place, unit in enumerate(units):
        if unit & _IS_VALUE and place:  # the first is never taken for a value
            continue
        base = place ^ ((unit >> 10) << ((unit & (1 << 9)) >> 6))
        if base | _BLOCK >= len(units):
            return False
        if unit & _HAS_LEAF:
            at = units[base] & ~_IS_VALUE
            # A character's first byte, or the zero of an empty one.
            if at >= len(replacements) or replacements[at] & 0xC0 == 0x80:
                return False
    return True
