"""Several engines read the same tokens and tell what comes next: how far are they from the first?

Shape legend: L tokens, V vocabulary.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parent / "peers"))

from llama_server import LlamaServer

from moebius.bench.quality import Figures, RowModel
from moebius.engine.config import EngineConfig
from moebius.engine.step_memory import PROMPT_LOGIT_ROWS

# The smallest number of float32, as a logarithm: what a server says of a probability of 0.
LEAST = math.log(1.4e-45)
_GAP = torch.tensor([1.0, -1.0], dtype=torch.float64)


@dataclass(frozen=True)
class Reading:
    """Tokens of which those behind `start` are to be told, each from all before it."""

    ids: list[int]
    start: int = 0


class Reader(Protocol):
    """An engine that tells what comes next."""

    weight_bytes: int

    def rows(self, reading: Reading) -> Iterator[Tensor]:
        """Log-probabilities (L, V), float64, of the tokens from start + 1 on, a few at a time."""
        ...


class Ours:
    """As `moebius serve` computes with these options."""

    def __init__(self, path: Path, length: int, **options: Any) -> None:
        self._model = RowModel(path, EngineConfig(**options), length)
        self.weight_bytes = self._model.load()

    def rows(self, reading: Reading) -> Iterator[Tensor]:
        self._model.execute(reading.ids[:-1])
        stop = len(reading.ids) - 1
        for start in range(reading.start, stop, PROMPT_LOGIT_ROWS):
            yield self._model.log_probabilities(start, min(start + PROMPT_LOGIT_ROWS, stop))


class Theirs:
    """llama.cpp's server, one token a request as when it writes an answer: those before are in its
    cache. Of each it is asked for the probabilities of its whole vocabulary."""

    def __init__(self, server: LlamaServer, file: Path, vocab: int) -> None:
        self._server = server
        self._vocab = vocab
        self.weight_bytes = file.stat().st_size

    def rows(self, reading: Reading) -> Iterator[Tensor]:
        for stop in range(reading.start + 1, len(reading.ids)):
            body = {"prompt": reading.ids[:stop], "n_predict": 1, "n_probs": self._vocab}
            body |= {"temperature": 0, "cache_prompt": True}
            [said] = self._server.ask("/completion", body)["completion_probabilities"]
            top = said["top_logprobs"]
            if len(top) != self._vocab:
                raise RuntimeError(f"llama-server gives {len(top)} of {self._vocab} probabilities")
            row_V = torch.empty(self._vocab, dtype=torch.float64)
            row_V[[each["id"] for each in top]] = torch.tensor(
                [each["logprob"] for each in top], dtype=torch.float64
            )
            yield row_V.clamp(min=LEAST).unsqueeze(0)


@contextmanager
def llama(
    program: Path, file: Path, threads: int, context: int, **more: object
) -> Iterator[LlamaServer]:
    """llama.cpp as it serves by itself, one request at a time; cache_type_k="f32" is an option."""
    settings = {"--threads": threads, "--threads-batch": threads, "--ctx-size": context}
    settings |= {"--parallel": 1, "--flash-attn": "on", "--cache-ram": 0}
    settings |= {f"--{name.replace('_', '-')}": value for name, value in more.items()}
    server = LlamaServer(program, file, settings, ["--jinja"])
    try:
        yield server
    finally:
        server.close()


@dataclass
class Distance:
    """What one engine makes of the readings.

    moved: for each token, by how much the gap between the first engine's two most likely tokens
    differs, in nats
    """

    figures: Figures
    moved: list[float] = field(default_factory=list)

    def add(self, log_p_LV: Tensor, reference_LV: Tensor, target_L: Tensor) -> None:
        self.figures.add(log_p_LV, reference_LV, target_L)
        top_L2 = reference_LV.topk(2).indices
        before_L = reference_LV.gather(1, top_L2) @ _GAP
        after_L = log_p_LV.gather(1, top_L2) @ _GAP
        self.moved += (after_L - before_L).tolist()

    @property
    def gap_rms(self) -> float:
        """Root mean square of `moved`."""
        return math.sqrt(statistics.fmean(moved**2 for moved in self.moved))

    def record(self) -> dict[str, Any]:
        return {**self.figures.record(), "gap_moved_rms": self.gap_rms}


def compare(
    readers: Mapping[str, Reader], readings: Sequence[Reading], sizes: Tensor
) -> dict[str, Distance]:
    """The distance of each from the first, which is 0 from itself. sizes: a token's bytes, (V,)."""
    found = {
        label: Distance(Figures(label, reader.weight_bytes)) for label, reader in readers.items()
    }
    for number, reading in enumerate(readings):
        target_L = torch.tensor(reading.ids[reading.start + 1 :])
        reference_LV = torch.empty(0)
        for label, reader in readers.items():
            if len(reference_LV) == 0:
                reference_LV = torch.cat(list(reader.rows(reading)))
                _add(found[label], iter([reference_LV]), reference_LV, target_L)
            else:
                _add(found[label], reader.rows(reading), reference_LV, target_L)
            found[label].figures.num_bytes += int(sizes[target_L].sum())
        if number % 10 == 9:
            print(f"{number + 1} of {len(readings)} texts read", file=sys.stderr, flush=True)
    return found


def _add(
    distance: Distance, rows: Iterator[Tensor], reference_LV: Tensor, target_L: Tensor
) -> None:
    at = 0
    for log_p_LV in rows:
        stop = at + len(log_p_LV)
        distance.add(log_p_LV, reference_LV[at:stop], target_L[at:stop])
        at = stop
