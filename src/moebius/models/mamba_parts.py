"""What families with Mamba 2 layers (Granite 4, Nemotron-H) share."""

import math

from moebius.models.reading import ConfigReader

ROLES = (
    *(f"{name}.{x}" for name in ("in_proj", "conv1d", "out_proj") for x in ("weight", "bias")),
    "A_log",
    "dt_bias",
    "D",
    "norm.weight",
)
"""Of a Mamba 2 layer's parameters."""
# As transformers 5 writes it, and as Python does.
_INFINITIES = (math.inf, {"__float__": "Infinity"}, None)


def check_unbounded(reader: ConfigReader, key: str) -> None:
    """Raises ConfigError where time steps are to be bounded: transformers bounds those of prompts
    and not those of answers, so there is nothing that a model was meant to compute."""
    value = reader.get(key)
    bounds = value if isinstance(value, list) and len(value) == 2 else [value, value]
    if value is not None and not (bounds[0] == 0 and bounds[1] in _INFINITIES):
        raise reader.error(
            f"{key} is {value!r}; bounds of time steps, which hold for prompts and not for "
            "answers, are not supported"
        )
