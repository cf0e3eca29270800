"""llama.cpp's divergence from another engine's distributions, told by its own llama-perplexity.

The tool reads the tokens and the distributions that it compares with from a file; the second half
of each chunk is scored. A row has log-probabilities as 16-bit steps over the 16 nats below the most
likely token, and what is less likely counts as 16 nats below (tools/perplexity/perplexity.cpp).
"""

from __future__ import annotations

import math
import re
import struct
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from moebius.bench.quality import token_rows
from moebius.inspect.corpus import Document
from moebius.text import Tokenizer
from readings import Reader, Reading

RANGE = 16.0
STEPS = 65535
_ATTEMPTS = 6


class Said(NamedTuple):
    """Of the scored tokens.

    mean_divergence   from the base file's distributions, in nats; error: its standard error
    same_choice       the share of tokens for which both find the same one most likely
    perplexity        of the text
    """

    mean_divergence: float
    error: float
    same_choice: float
    perplexity: float


@dataclass(frozen=True)
class Coded:
    """Log-probabilities (L, V) as the file holds them: least + step * codes."""

    step_L: Tensor
    least_L: Tensor
    codes_LV: Tensor

    @classmethod
    def of(cls, log_p_LV: Tensor) -> Coded:
        most_L = log_p_LV.amax(-1)
        least_L = torch.maximum(log_p_LV.amin(-1), most_L - RANGE).float()
        step_L = ((most_L - least_L) / STEPS).float()
        codes_LV = ((log_p_LV - least_L[:, None]) / step_L[:, None]).round().clamp(0, STEPS)
        return cls(step_L, least_L, codes_LV.to(torch.int32))

    def log_probabilities(self) -> Tensor:
        """What a reader of the file takes them for, float64."""
        return self.codes_LV * self.step_L[:, None].double() + self.least_L[:, None].double()

    def divergence(self, log_q_LV: Tensor) -> Tensor:
        """To other distributions (L, V), as the tool reckons it: of what is likelier than e^-16."""
        log_p_LV = self.log_probabilities()
        apart_LV = log_p_LV.exp() * (log_p_LV - log_q_LV[:, : log_p_LV.shape[1]])
        return apart_LV.where(log_p_LV > -RANGE, 0.0).sum(-1)

    def write(self, file: BinaryIO) -> None:
        rows, vocab = self.codes_LV.shape
        words_LW = torch.zeros((rows, 4 + vocab + vocab % 2), dtype=torch.uint16)
        scales_L2 = torch.stack((self.step_L, self.least_L), dim=1)
        words_LW[:, :4] = scales_L2.view(torch.uint16)
        words_LW[:, 4 : 4 + vocab] = self.codes_LV.to(torch.uint16)
        file.write(words_LW.numpy().tobytes())


@dataclass
class Text:
    """Chunks of a text, and an engine's distributions over what is scored of them."""

    chunks: list[list[int]]
    coded: list[Coded] = field(default_factory=list)

    @classmethod
    def of(
        cls, documents: Sequence[Document], tokenizer: Tokenizer, length: int, count: int
    ) -> Text:
        """An even choice of so many chunks, each within a document."""
        rows = token_rows(documents, tokenizer, length, 10**9)
        whole = [row for row in rows if len(row) == length]
        count = min(count, len(whole))
        return cls([whole[i * len(whole) // count] for i in range(count)])

    def read(self, reader: Reader) -> Iterator[Tensor]:
        """Its log-probabilities (L, V) of what is scored of each chunk."""
        for ids in self.chunks:
            yield torch.cat(list(reader.rows(Reading(ids, scored(len(ids)).start))))

    @property
    def targets(self) -> list[Tensor]:
        """The scored tokens of each chunk."""
        at = scored(len(self.chunks[0]))
        return [torch.tensor(ids[at.start + 1 : at.stop + 1]) for ids in self.chunks]

    def judge(self, rows: Iterable[Tensor]) -> Said:
        """What is to be said of another engine, whose log-probabilities (L, V) of each chunk come
        one after the other."""
        apart = []
        same = []
        nats = []
        for coded, target_L, log_q_LV in zip(self.coded, self.targets, rows, strict=True):
            apart.append(coded.divergence(log_q_LV))
            same.append(log_q_LV.argmax(-1) == coded.codes_LV.argmax(-1))
            nats.append(-log_q_LV.gather(1, target_L[:, None])[:, 0])
        apart_T = torch.cat(apart).double()
        same_T = torch.cat(same).double()
        nats_T = torch.cat(nats).double()
        error = float(apart_T.std()) / len(apart_T) ** 0.5
        return Said(
            float(apart_T.mean()), error, float(same_T.mean()), math.exp(float(nats_T.mean()))
        )

    def write(self, path: Path) -> None:
        """As llama-perplexity reads it."""
        length = len(self.chunks[0])
        vocab = self.coded[0].codes_LV.shape[1]
        with path.open("wb") as file:
            file.write(b"_logits_" + struct.pack("<3i", length, vocab, len(self.chunks)))
            for ids in self.chunks:
                file.write(struct.pack(f"<{length}i", *ids))
            for coded in self.coded:
                coded.write(file)


def scored(length: int) -> range:
    """The positions of a chunk whose next tokens are compared."""
    return range(length // 2, length - 1)


def divergence(tool: Path, model: Path, base: Path, length: int, threads: int) -> Said:
    """What llama-perplexity says of a model; it may end before it has said it."""
    command = [str(tool), "-m", str(model), "-c", str(length), "-t", str(threads), "-fa", "on"]
    command += ["--kl-divergence", "--kl-divergence-base", str(base)]
    said = ""
    for _ in range(_ATTEMPTS):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        said = done.stdout + done.stderr
        mean = re.search(r"Mean\s+KLD:\s+(\S+)\s+±\s+(\S+)", said)
        same = re.search(r"Same top p:\s+(\S+)", said)
        own = re.search(r"Mean PPL\(Q\)\s*:\s+(\S+)", said)
        if mean and same and own:
            figures = (float(found) for found in (mean[1], mean[2], same[1], own[1]))
            divergent, error, percent, perplexity = figures
            return Said(divergent, error, percent / 100, perplexity)
    raise SystemExit(f"{tool} says nothing: {said[-500:]}")
