"""What a model directory's files, or a GGUF file's keys, say about ending and sampling."""

import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from moebius.errors import ConfigError, RequestError
from moebius.files import read_json
from moebius.request.params import SamplingParams
from moebius.text.gguf_vocabulary import end_ids_by_key
from moebius.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

_GENERATION = "generation_config.json"
_GGUF_SAMPLING = "general.sampling."
# What GGUF calls other than generation_config.json does.
_GGUF_NAMES = {"temp": "temperature", "penalty_repeat": "repetition_penalty"}
_SAMPLING = {
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
}
# What else in the file changes transformers' answers, and the value that changes nothing.
_NOT_DONE: dict[str, object] = {
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "constraints": None,
    "diversity_penalty": 0,
    "dola_layers": None,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "exponential_decay_length_penalty": None,
    "force_words_ids": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "guidance_scale": 1,
    "max_length": 20,
    "max_new_tokens": None,
    "max_time": None,
    "min_length": 0,
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "penalty_alpha": 0,
    "sequence_bias": None,
    "stop_strings": None,
    "suppress_tokens": None,
    "token_healing": False,
    "top_h": None,
    "typical_p": 1,
    "watermarking_config": None,
}
_GGUF_NOT_DONE: dict[str, object] = {"mirostat": 0, "xtc_probability": 0}


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """End tokens and sampling defaults of one model directory or GGUF file.

    What is in its files but has no effect is logged once, when they are read.

    eos_ids    union of generation_config.json, config.json (its text_config too) and the tokenizer,
               without ids that the model's logits do not reach; of a GGUF file's keys and the
               tokenizer
    sampling   those of temperature, top_k, top_p, min_p and repetition_penalty that
               generation_config.json or GGUF's general.sampling keys give, by the names of
               SamplingParams, which takes each of them. `do_sample` has no effect, as in vLLM: a
               file that says do_sample = false without a temperature is sampled at OpenAI's default
               of 1, one that wants greedy says temperature = 0.
    """

    eos_ids: frozenset[int] = frozenset()
    sampling: Mapping[str, float | int] = field(default_factory=dict)

    @classmethod
    def load(cls, directory: Path | str, tokenizer: Tokenizer | None = None) -> Self:
        """Read a model directory; missing files say nothing. Raises ConfigError on a broken one."""
        directory = Path(directory)
        generation = read_json(directory / _GENERATION, default={})
        config = read_json(directory / "config.json", default={})
        inner = config.get("text_config")
        text_config = inner if isinstance(inner, dict) else {}
        ends = {
            _GENERATION: _eos_ids(generation, _GENERATION),
            "config.json": _eos_ids(config, "config.json"),
            "config.json: text_config": _eos_ids(text_config, "config.json: text_config"),
        }
        if tokenizer is not None:
            ends["the tokenizer"] = set(tokenizer.end_ids)
        vocab_size = config.get("vocab_size", text_config.get("vocab_size"))
        reached = [_reached(ids, name, vocab_size) for name, ids in ends.items()]
        sampling = _sampling(generation, _GENERATION, _NOT_DONE)
        return cls(frozenset().union(*reached), MappingProxyType(sampling))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, object], tokenizer: Tokenizer) -> Self:
        """Of a GGUF file's keys, and the tokenizer that its model is used with.

        Raises TokenizerError or ConfigError naming a key that is wrong.
        """
        found: dict[str, Any] = {}
        for key in metadata:
            if key.startswith(_GGUF_SAMPLING):
                name = key.removeprefix(_GGUF_SAMPLING)
                value = metadata[key]
                # Written in 32 bits, it is meant as the shortest decimal that reads as the same.
                short = float(f"{value:.7g}") if isinstance(value, float) else value
                found[_GGUF_NAMES.get(name, name)] = short
        sampling = _sampling(found, _GGUF_SAMPLING.rstrip("."), _GGUF_NOT_DONE)
        return cls(tokenizer.end_ids | end_ids_by_key(metadata), MappingProxyType(sampling))


def _eos_ids(config: Mapping[str, Any], name: str) -> set[int]:
    found = config.get("eos_token_id")
    ids = [token for token in (found if isinstance(found, list) else [found]) if token is not None]
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool):
            raise ConfigError(
                f"{name}: eos_token_id holds {token!r}; it must be a token id or a list of them"
            )
    return set(ids)


def _reached(ids: set[int], name: str, vocab_size: object) -> set[int]:
    """Without those that no logit is for: they end nothing."""
    count = vocab_size if isinstance(vocab_size, int) else max(ids, default=0) + 1
    beyond = sorted(token for token in ids if not 0 <= token < count)
    if beyond:
        text = "%s: end token id %s is not in the model's vocabulary of %d; ignored"
        log.warning(text, name, ", ".join(map(str, beyond)), count)
    return ids.difference(beyond)


def _sampling(
    generation: Mapping[str, Any], source: str, not_done: Mapping[str, object]
) -> dict[str, float | int]:
    """The values that SamplingParams takes.

    The others, and what is not done at all, go into one line of the log.
    """
    sampling: dict[str, float | int] = {}
    ignored = []
    for name, kind in _SAMPLING.items():
        written = generation.get(name)
        if written is None:
            continue
        value = _number(name, kind, written, source)
        try:
            SamplingParams().with_(**{name: value})
        except RequestError as error:
            ignored.append(f"{name} = {written!r} ({str(error).partition('; ')[2]})")
        else:
            sampling[name] = value
    if generation.get("do_sample") is False and sampling.get("temperature") != 0:
        ignored.append("do_sample = false (temperature = 0 is greedy)")
    for name, neutral in not_done.items():
        written = generation.get(name)
        if written not in (None, neutral, [], {}):
            ignored.append(f"{name} = {written!r} (not supported)")
    if ignored:
        log.warning("%s: ignored: %s", source, "; ".join(ignored))
    return sampling


def _number(name: str, kind: type[int] | type[float], written: object, source: str) -> float | int:
    if not isinstance(written, (int, float)) or isinstance(written, bool):
        raise ConfigError(f"{source}: {name} is {written!r}; it must be a number")
    if not abs(written) <= sys.float_info.max:  # NaN, or an integer longer than any float
        return written
    if kind(written) != written:
        raise ConfigError(f"{source}: {name} is {written!r}; it must be a whole number")
    return kind(written)
