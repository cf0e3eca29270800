"""What a model directory says about ending and sampling: generation_config.json, config.json, the tokenizer."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from moebius.config import read_json
from moebius.errors import ConfigError
from moebius.text.tokenizer import Tokenizer

_SAMPLING = {"temperature": float, "top_k": int, "top_p": float, "min_p": float, "repetition_penalty": float}


def _eos_ids(config: Mapping[str, Any], name: str) -> frozenset[int]:
    found = config.get("eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool) or token < 0:
            raise ConfigError(f"{name}: eos_token_id holds {token!r}; it must be a token id or a list of them")
    return frozenset(ids)


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """End tokens and sampling defaults of one model directory.

    eos_ids    union of generation_config.json, config.json (its text_config too) and the tokenizer
    sampling   those of temperature, top_k, top_p, min_p and repetition_penalty that generation_config.json gives, by
               the names of SamplingParams. `do_sample` has no effect, as in vLLM: a file that says do_sample = false
               without a temperature is sampled at OpenAI's default of 1, one that wants greedy says temperature = 0.
    """

    eos_ids: frozenset[int] = frozenset()
    sampling: Mapping[str, float | int] = field(default_factory=dict)

    @classmethod
    def load(cls, directory: Path | str, tokenizer: Tokenizer | None = None) -> Self:
        """Read a model directory; missing files say nothing. Raises ConfigError on a broken one."""
        directory = Path(directory)
        generation = read_json(directory / "generation_config.json", default={})
        config = read_json(directory / "config.json", default={})
        eos_ids = _eos_ids(generation, "generation_config.json") | _eos_ids(config, "config.json")
        if isinstance(config.get("text_config"), dict):
            eos_ids |= _eos_ids(config["text_config"], "config.json: text_config")
        if tokenizer is not None and tokenizer.eos_id is not None:
            eos_ids |= {tokenizer.eos_id}
        sampling: dict[str, float | int] = {}
        for name, kind in _SAMPLING.items():
            value = generation.get(name)
            if value is None:
                continue
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not number or kind(value) != value:
                raise ConfigError(f"generation_config.json: {name} is {value!r}; it must be a number")
            sampling[name] = kind(value)
        return cls(eos_ids, MappingProxyType(sampling))
