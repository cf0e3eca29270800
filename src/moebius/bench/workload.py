"""What is asked of a server or an engine: seeded prompts, lengths and arrival times. No tensors."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moebius.errors import ConfigError
from moebius.files import read_text
from moebius.text import Tokenizer

# One token each, with the space before it, in the vocabularies of the models that are served today.
_WORDS = (
    "the of and to in is that for it as was with on be at by this from are have or an they which "
    "one you had not but what all were when we there can use your each she do how their if will up "
    "other about out many then them these so"
)


@dataclass(frozen=True, slots=True)
class Sample:
    """One request: a text or token ids, and the most tokens to answer with.

    input_tokens is the prompt's length as far as it is known here; what a server reports goes
    before it.
    """

    prompt: str | tuple[int, ...]
    input_tokens: int
    output_tokens: int


def require_positive(**options: int) -> None:
    """ConfigError naming the first of these options that is less than 1."""
    for name, value in options.items():
        if value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")


@dataclass(frozen=True, slots=True)
class Dataset:
    """Which requests to send: `random` ones, or those of a file (`jsonl`). Lengths are in tokens.

    Random lengths are uniform in [(1 - range_ratio) * len, (1 + range_ratio) * len]. output_len
    None is 128 for random requests and what the file says for its own; where given it is the length
    of all.

    A file holds one JSON object a line (or one array of them), in one of two shapes: {"prompt":
    "...", "output_tokens": 128}, or ShareGPT's {"conversations": [{"value": "..."}, {"value":
    "..."}]}, whose first turn is the prompt and whose second, counted by the tokenizer, is the
    answer's length.
    """

    name: str = "random"
    path: Path | None = None
    input_len: int = 512
    output_len: int | None = None
    range_ratio: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in ("random", "jsonl"):
            raise ConfigError(f"--dataset-name is {self.name!r}; use random or jsonl")
        if (self.name == "jsonl") != (self.path is not None):
            raise ConfigError("--dataset-name jsonl and --dataset-path FILE go together")
        if not 0 <= self.range_ratio < 1:
            raise ConfigError(f"--random-range-ratio is {self.range_ratio}; it must lie in [0, 1)")
        require_positive(input_len=self.input_len)
        if self.output_len is not None:
            require_positive(output_len=self.output_len)

    def samples(
        self, count: int, seed: int = 0, tokenizer: Tokenizer | None = None
    ) -> list[Sample]:
        """The file's first `count` requests, or as many random ones.

        With a tokenizer random prompts are ordinary token ids of exactly the length asked for;
        without one they are texts of as many short words. Raises ConfigError naming the file's
        line.
        """
        require_positive(num_prompts=count)
        if self.path is None:
            return self._random(count, seed, tokenizer)
        return self._read(self.path, count, tokenizer)

    def _random(self, count: int, seed: int, tokenizer: Tokenizer | None) -> list[Sample]:
        rng = np.random.default_rng(seed)
        ids: list[int] = []
        if tokenizer is not None:
            ids = [i for i in range(tokenizer.vocab_size) if i not in tokenizer.special_ids]
        words = np.array(ids or _WORDS.split())

        def lengths(mean: int) -> list[int]:
            low = max(1, math.floor(mean * (1 - self.range_ratio)))
            high = math.ceil(mean * (1 + self.range_ratio))
            return list(rng.integers(low, high, count, endpoint=True).tolist())

        prompts = lengths(self.input_len)
        answers = lengths(self.output_len or 128)
        samples = []
        for inputs, outputs in zip(prompts, answers, strict=True):
            drawn = rng.choice(words, inputs).tolist()
            prompt: str | tuple[int, ...] = tuple(drawn) if ids else " ".join(drawn)
            samples.append(Sample(prompt, inputs, outputs))
        return samples

    def _read(self, path: Path, count: int, tokenizer: Tokenizer | None) -> list[Sample]:
        try:
            text = read_text(path)
            if text.lstrip().startswith("["):
                entries = json.loads(text)
            else:
                entries = [json.loads(line) for line in text.split("\n") if line]
        except OSError as error:
            reason = error.strerror or error
            raise ConfigError(f"--dataset-path {path} cannot be read: {reason}") from error
        except (ValueError, RecursionError) as error:
            raise ConfigError(
                f"--dataset-path {path} does not hold one JSON object a line: {error}"
            ) from error
        if not entries:
            raise ConfigError(f"--dataset-path {path} is empty")
        return [
            _sample(entry, f"{path}, entry {i}", self.output_len, tokenizer)
            for i, entry in enumerate(entries[:count], 1)
        ]


def _sample(line: Any, where: str, output_len: int | None, tokenizer: Tokenizer | None) -> Sample:
    entry = line if isinstance(line, dict) else {}
    prompt = entry.get("prompt")
    wanted = output_len or entry.get("output_tokens")
    turns = entry.get("conversations")
    if isinstance(turns, list) and turns and all(isinstance(turn, dict) for turn in turns[:2]):
        prompt = turns[0].get("value")
        if wanted is None and len(turns) > 1 and tokenizer is not None:
            wanted = len(tokenizer.encode(str(turns[1].get("value"))))
    if not isinstance(prompt, str) or not prompt:
        raise ConfigError(f"{where}: no `prompt` text and no `conversations`")
    if not isinstance(wanted, int) or wanted < 1:
        raise ConfigError(
            f"{where}: how many tokens to answer with is not said; give it output_tokens, or the "
            "command an output length"
        )
    length = len(tokenizer.encode(prompt)) if tokenizer else len(prompt.split())
    return Sample(prompt, length, wanted)


def arrival_times(count: int, rate: float, burstiness: float = 1.0, seed: int = 0) -> list[float]:
    """Seconds at which requests arrive: gamma intervals of mean 1 / rate and shape `burstiness`.

    Burstiness 1 is a Poisson process, less comes in bursts, more evenly. The intervals are scaled
    so that the last request arrives at count / rate: seeds differ in when, not in how much. An
    infinite rate: all at once.
    """
    require_positive(num_prompts=count)
    if not rate > 0:
        raise ConfigError(
            f"--request-rate is {rate}; it must be a positive number of requests a second, or inf"
        )
    if not 0 < burstiness < math.inf:
        raise ConfigError(f"--burstiness is {burstiness}; it must be a positive number")
    at_once = [0.0] * count
    if math.isinf(rate):
        return at_once
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.gamma(burstiness, 1 / (rate * burstiness), count))
    if times[-1] == 0:
        return at_once
    return list((times * (count / rate / times[-1])).tolist())
