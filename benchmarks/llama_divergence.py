"""llama.cpp's divergence from another engine's distributions, told by its own llama-perplexity.

The tool reads the tokens and the distributions that it compares with from a file; the second half
of each chunk is scored. A row has log-probabilities as 16-bit steps over the 16 nats below the most
likely token, and what is less likely counts as 16 nats below (tools/perplexity/perplexity.cpp).
"""

from __future__ import annotations

import re
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

RANGE = 16.0
STEPS = 65535
_ATTEMPTS = 6


class Said(NamedTuple):
    """Nats a token, and the share of tokens for which both find the same one most likely."""

    mean_divergence: float
    error: float
    same_choice: float


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
        return cls(step_L, least_L, codes_LV)

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
        words_LW[:, 4 : 4 + vocab] = self.codes_LV.to(torch.int32).to(torch.uint16)
        file.write(words_LW.numpy().tobytes())


def begin(file: BinaryIO, chunks: Sequence[Sequence[int]], vocab: int) -> None:
    """The head: all chunks' tokens, as many in each. The coded rows of each chunk follow."""
    length = len(chunks[0])
    file.write(b"_logits_" + struct.pack("<3i", length, vocab, len(chunks)))
    for ids in chunks:
        assert len(ids) == length
        file.write(struct.pack(f"<{length}i", *ids))


def scored(length: int) -> range:
    """The positions of a chunk whose next tokens are compared."""
    return range(length // 2, length - 1)


def divergence(
    tool: Path, model: Path, base: Path, length: int, threads: int, more: Sequence[str] = ()
) -> Said:
    """What llama-perplexity says of a model; it may end before it has said it."""
    command = [str(tool), "-m", str(model), "-c", str(length), "-t", str(threads), *more]
    command += ["--kl-divergence", "--kl-divergence-base", str(base)]
    said = ""
    for _ in range(_ATTEMPTS):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        said = done.stdout + done.stderr
        mean = re.search(r"Mean\s+KLD:\s+(\S+)\s+±\s+(\S+)", said)
        same = re.search(r"Same top p:\s+(\S+)", said)
        if mean and same:
            return Said(float(mean[1]), float(mean[2]), float(same[1]) / 100)
    raise SystemExit(f"{tool} says nothing: {said[-500:]}")
