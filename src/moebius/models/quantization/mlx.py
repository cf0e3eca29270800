"""mlx-lm's `quantization`: bits and a group size for all modules, and others for some by name."""

from collections.abc import Mapping
from typing import Any

from moebius.models.quantization.fields import opened, word
from moebius.models.quantization.matching import everything
from moebius.models.quantization.record import Quantization, Rule
from moebius.models.quantization.schemes import AffineScheme

_WHERE = "config.json: quantization"
_KEYS = {"bits": 4, "group_size": 64, "mode": "affine"}


class _Named:
    """One module."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, module: str, kind: str) -> bool:
        return module == self._name


def read(raw: Mapping[str, Any]) -> Quantization:
    """Objects and false are one module's, by its name; the rest is for all others."""
    usual = {key: value for key, value in raw.items() if not isinstance(value, (Mapping, bool))}
    rules = []
    for name, value in raw.items():
        if isinstance(value, Mapping):
            rules.append(Rule(_Named(name), _scheme({**usual, **value}, f"{_WHERE}: {name}")))
        elif value is False:
            rules.append(Rule(_Named(name), None))
    rules.append(Rule(everything, _scheme(usual, _WHERE)))
    return Quantization("mlx", tuple(rules))


def _scheme(raw: Mapping[str, Any], where: str) -> AffineScheme:
    reader = opened(raw, _KEYS, (), where)
    word(reader, "mode", ("affine",))
    bits = reader.integer("bits")
    if bits not in (4, 8):
        raise reader.error(f"bits is {bits}; supported are 4 and 8")
    group = reader.integer("group_size")
    if group % 32:
        raise reader.error(f"group_size is {group}; it must be a multiple of 32")
    reader.finish()
    return AffineScheme(bits, group)
