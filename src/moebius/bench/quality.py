"""How well models predict a text: bits per byte, and how far each is from the first of them.

Each is computed as it would be served: an engine's runner, its kernels and its KV cache, one row of
text at a time. The rows are the same for all, and so are the tokens.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moebius.engine.config import EngineConfig
from moebius.engine.load import load_engine, prepare
from moebius.engine.prepared import Prepared
from moebius.engine.step_memory import PROMPT_LOGIT_ROWS
from moebius.errors import ConfigError, NumericalError
from moebius.inspect.corpus import Document
from moebius.ops.steps import StepInputs
from moebius.ops.threads import TorchThreads, default_threads
from moebius.progress import Progress, silent
from moebius.text import Tokenizer, load_text
from moebius.text.pieces import encode_in_pieces

# Rows of logits that are compared at a time.
_LOGIT_ROWS = PROMPT_LOGIT_ROWS


class Candidate(NamedTuple):
    """A model to measure, how it is computed, and where another tokenizer is than its own."""

    label: str
    path: Path
    config: EngineConfig
    tokenizer: Path | None = None


@dataclass(slots=True)
class Figures:
    """Of one candidate, summed over the scored tokens.

    nats            of the tokens themselves
    divergence      Kullback-Leibler from the first candidate's distribution to this one's, nats
    same_choice     at how many tokens both find the same one most likely
    weight_bytes    that the weights take
    """

    label: str
    weight_bytes: int
    tokens: int = 0
    num_bytes: int = 0
    nats: float = 0.0
    divergence: float = 0.0
    same_choice: int = 0

    def add(self, log_p_LV: Tensor, reference_LV: Tensor, target_L: Tensor) -> None:
        """Rows of log-probabilities, the first candidate's, and the tokens that were there.

        Raises NumericalError for what is no number.
        """
        nats = -float(log_p_LV.gather(1, target_L.unsqueeze(1)).sum())
        if not math.isfinite(nats):
            raise NumericalError(f"{self.label}: its logits are no finite numbers")
        self.tokens += len(target_L)
        self.nats += nats
        wide = min(log_p_LV.shape[1], reference_LV.shape[1])
        p_LV = reference_LV[:, :wide].exp()
        apart_LV = p_LV * (reference_LV[:, :wide] - log_p_LV[:, :wide])
        self.divergence += float(apart_LV.sum())
        same_L = log_p_LV.argmax(-1) == reference_LV.argmax(-1)
        self.same_choice += int(same_L.sum())

    def record(self) -> dict[str, Any]:
        """As JSON has it; nats a token, bits a byte."""
        tokens = max(self.tokens, 1)
        return {
            "label": self.label,
            "weight_bytes": self.weight_bytes,
            "tokens": self.tokens,
            "bytes": self.num_bytes,
            "bits_per_byte": self.nats / max(self.num_bytes, 1) / math.log(2),
            "perplexity": math.exp(min(self.nats / tokens, 700.0)),
            "mean_divergence": self.divergence / tokens,
            "same_choice": self.same_choice / tokens,
        }


def token_rows(
    documents: Iterable[Document], tokenizer: Tokenizer, length: int, max_tokens: int
) -> list[list[int]]:
    """Documents as rows of up to `length` tokens, each within one document.

    Of more than `max_tokens` an even choice. Raises ConfigError for a text without two tokens.
    """
    start = tokenizer.encode("")
    rows: list[list[int]] = []
    for document in documents:
        ids = list(start)
        for piece in encode_in_pieces(document.text, tokenizer.encode_ordinary):
            ids += piece
        rows += [ids[at : at + length] for at in range(0, len(ids), length)]
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise ConfigError("the text is too short: there are no two tokens in a row")
    total = sum(map(len, rows))
    if total > max_tokens:
        count = max(1, len(rows) * max_tokens // total)
        rows = [rows[i * len(rows) // count] for i in range(count)]
    return rows


def measure(
    candidates: Sequence[Candidate],
    documents: Iterable[Document],
    *,
    row_length: int = 512,
    max_tokens: int = 20_000,
    progress: Progress = silent,
) -> list[Figures]:
    """Figures of each candidate on the documents; divergences are from the first.

    Raises UsageError for what cannot be loaded, ConfigError where the tokenizers differ, and
    NumericalError for logits that are no numbers.
    """
    tokenizer, _ = load_text(candidates[0].path, candidates[0].tokenizer)
    models = [RowModel(each.path, each.config, row_length) for each in candidates]
    length = min([row_length, *(model.max_length for model in models)])
    rows = token_rows(documents, tokenizer, length, max_tokens)
    _check_tokens(candidates, tokenizer, rows)
    figures = [
        Figures(each.label, model.load()) for each, model in zip(candidates, models, strict=True)
    ]
    measured = list(zip(models, figures, strict=True))
    sizes = torch.tensor([len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)])
    with TorchThreads(default_threads()), progress("measuring", len(rows)) as advance:
        for row in rows:
            _measure_row(measured, row, sizes)
            advance(1)
    return figures


def _check_tokens(
    candidates: Sequence[Candidate], tokenizer: Tokenizer, rows: Sequence[Sequence[int]]
) -> None:
    """Raises ConfigError where a candidate's tokenizer gives a row's text other tokens."""
    sample = tokenizer.decode(rows[0], skip_special_tokens=False)
    wanted = tokenizer.encode_ordinary(sample)
    for each in candidates:
        if each.path == candidates[0].path:
            continue
        own, _ = load_text(each.path, each.tokenizer)
        if own.encode_ordinary(sample) != wanted:
            raise ConfigError(f"{each.label}: its tokenizer gives the text other tokens")


class RowModel:
    """A model as it would be served, which reads one row of up to `length` tokens at a time.

    Raises UsageError for what cannot be loaded, before anything is.
    """

    def __init__(self, path: Path, config: EngineConfig, length: int) -> None:
        self._path = path
        self._config = replace(
            config,
            max_num_seqs=1,
            max_num_batched_tokens=max(length, _LOGIT_ROWS),
            max_model_len=length,
            enable_prefix_caching=False,
        )
        self._prepared: Prepared | None = prepare(path, self._config)
        self.max_length = self._prepared.plan.max_model_len

    def load(self) -> int:
        """Bytes that the weights take."""
        assert self._prepared is not None, "it is loaded already"
        prepared = self._prepared
        self._prepared = None
        engine = load_engine(self._path, self._config, prepared=prepared)
        self._runner = engine.runner
        self._block_size = engine.info.block_size
        return sum(weight.nbytes for weight in prepared.weights)

    @torch.inference_mode()
    def execute(self, ids: Sequence[int]) -> None:
        """Read a row, which takes the place of the one before."""
        blocks = [list(range(-(-len(ids) // self._block_size)))]
        others = [blocks] * (len(self._runner.cache.layout.windows) - 1)
        device = self._runner.device
        step = StepInputs.build([ids], [0], blocks, self._block_size, device, others=others)
        self._runner.execute(step)

    @torch.inference_mode()
    def log_probabilities(self, start: int, stop: int) -> Tensor:
        """Of what follows each of these tokens of the row: (stop - start, V), float64.

        At most PROMPT_LOGIT_ROWS of them at a time.
        """
        logits_LV = self._runner.logits(range(start, stop)).cpu()
        return F.log_softmax(logits_LV.double(), dim=-1)


def _measure_row(
    measured: Sequence[tuple[RowModel, Figures]], row: Sequence[int], sizes: Tensor
) -> None:
    """Add what the models make of a row. Nothing is behind its last token to be predicted."""
    for model, _ in measured:
        model.execute(row[:-1])
    for start in range(0, len(row) - 1, _LOGIT_ROWS):
        stop = min(start + _LOGIT_ROWS, len(row) - 1)
        target_L = torch.tensor(row[start + 1 : stop + 1])
        num_bytes = int(sizes[target_L].sum())
        reference_LV = None
        for model, figures in measured:
            log_p_LV = model.log_probabilities(start, stop)
            if reference_LV is None:
                reference_LV = log_p_LV
            figures.add(log_p_LV, reference_LV, target_L)
            figures.num_bytes += num_bytes
