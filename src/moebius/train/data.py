"""Documents as memory-mapped tokens, and the batch of every step.

A stream is one file of uint16 token ids: every document is preceded by <|endoftext|>, and one more stands at the end.
A batch is a pure function of (streams, mixture, seed, step): there is no reader state, so training resumes at any step
by naming it. Shape suffixes: R rows, L tokens in a row.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from moebius.errors import ConfigError
from moebius.train.chat import conversations
from moebius.train.corpus import KINDS, Corpus, Document, read_corpus
from moebius.train.recipe import Recipe
from moebius.train.tokenizer import END_OF_TEXT, IM_START, render_chat, special_id, train_tokenizer


@dataclass(frozen=True)
class Batch:
    """Rows of tokens and what follows each; `document_RL` numbers the documents within a row, from 0."""

    input_RL: torch.Tensor
    target_RL: torch.Tensor
    document_RL: torch.Tensor


@dataclass(frozen=True)
class PreparedData:
    """A tokenizer and the streams made with it, by kind; `facts` is what the model card says about them."""

    tokenizer: Tokenizer
    train: dict[str, np.ndarray]
    heldout: dict[str, np.ndarray]
    facts: dict[str, Any]


def prepare(recipe: Recipe, folder: Path, root: Path | None = None) -> PreparedData:
    """Tokenizer and token files for `recipe`, made in `folder` unless they are there already.

    Files that were made from another recipe, corpus or Python are made anew.
    """
    corpus = read_corpus(recipe.corpus.heldout_share, root)
    key = hashlib.sha256(repr((recipe.corpus, recipe.tokenizer, corpus.sha256)).encode()).hexdigest()
    done = folder / "data.json"
    if not (done.exists() and json.loads(done.read_text())["key"] == key):
        folder.mkdir(parents=True, exist_ok=True)
        done.unlink(missing_ok=True)
        facts = _write(recipe, corpus, folder)
        done.write_text(json.dumps({"key": key, "facts": facts}, indent=2) + "\n")
    facts = json.loads(done.read_text())["facts"]
    return PreparedData(
        tokenizer=Tokenizer.from_file(str(folder / "tokenizer.json")),
        train=_open(folder, "train", facts),
        heldout=_open(folder, "heldout", facts),
        facts=facts,
    )


def _write(recipe: Recipe, corpus: Corpus, folder: Path) -> dict[str, Any]:
    tokenizer = train_tokenizer((d.text for d in corpus.train), recipe.tokenizer.vocab_size)
    tokenizer.save(str(folder / "tokenizer.json"))
    chats = conversations(corpus.train, recipe.corpus.chat_examples, recipe.corpus.seed)
    chat_documents = [Document(f"chat/{i}", "chat", render_chat(chat)) for i, chat in enumerate(chats)]
    sizes: dict[str, dict[str, dict[str, int]]] = {"train": {}, "heldout": {}}
    for split, documents in (("train", [*corpus.train, *chat_documents]), ("heldout", list(corpus.heldout))):
        for kind, tokens in streams(documents, tokenizer).items():
            tokens.tofile(folder / f"{split}.{kind}.bin")
            texts = [d.text for d in documents if d.kind == kind]
            num_bytes = sum(len(text.encode()) for text in texts)
            sizes[split][kind] = {"documents": len(texts), "bytes": num_bytes, "tokens": len(tokens)}
    return {"corpus_sha256": corpus.sha256, "python_version": corpus.python_version, "sizes": sizes}


def _open(folder: Path, split: str, facts: dict[str, Any]) -> dict[str, np.ndarray]:
    return {
        kind: np.memmap(folder / f"{split}.{kind}.bin", dtype=np.uint16, mode="r") for kind in facts["sizes"][split]
    }


def streams(documents: Collection[Document], tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """Documents as one stream for each kind that there is."""
    texts = {kind: [d.text for d in documents if d.kind == kind] for kind in KINDS}
    return {kind: pack(found, tokenizer) for kind, found in texts.items() if found}


def pack(texts: Iterable[str], tokenizer: Tokenizer) -> np.ndarray:
    """All texts as one uint16 array: <|endoftext|> before each and at the end."""
    end = special_id(tokenizer, END_OF_TEXT)
    parts: list[int] = [end]
    for encoding in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False):
        parts.extend(encoding.ids)
        parts.append(end)
    return np.array(parts, dtype=np.uint16)


def document_numbers(tokens_RL: torch.Tensor, end_of_text: int, im_start: int) -> torch.Tensor:
    """Number the documents within each row, from 0 (R, L).

    A document starts at the <|endoftext|> before it, so that its first token is predicted from something; where a
    conversation follows, it starts at <|im_start|>, which is how the chat template begins when the model is served.
    """
    is_end_RL = tokens_RL == end_of_text
    before_chat_RL = torch.zeros_like(is_end_RL)
    before_chat_RL[:, :-1] = is_end_RL[:, :-1] & (tokens_RL[:, 1:] == im_start)
    starts_RL = is_end_RL & ~before_chat_RL
    starts_RL[:, 1:] |= before_chat_RL[:, :-1]
    return starts_RL.cumsum(1)


class Batches:
    """The training batches of a recipe, by step.

    An epoch passes over each kind's stream as often as the mixture says, each pass cut into rows at another offset,
    and shuffles all rows together. Offsets and order follow from (seed, epoch) alone.
    """

    def __init__(self, data: PreparedData, mixture: dict[str, int], rows: int, length: int, seed: int) -> None:
        unknown = [kind for kind, copies in mixture.items() if copies and kind not in data.train]
        if unknown:
            raise ConfigError(f"mixture.{unknown[0]} names no training stream; there are {', '.join(data.train)}")
        self._streams = [(data.train[kind], copies) for kind, copies in sorted(mixture.items()) if copies]
        self._rows, self._length, self._seed = rows, length, seed
        self._end = special_id(data.tokenizer, END_OF_TEXT)
        self._im_start = special_id(data.tokenizer, IM_START)
        per_stream = [copies * max(0, (len(t) - 1) // length - 1) for t, copies in self._streams]
        self.steps_per_epoch = sum(per_stream) // rows
        if self.steps_per_epoch == 0:
            raise ConfigError(f"the training text has fewer than {rows} rows of {length} tokens, not one batch")
        self._epoch = -1
        self._order = np.empty((0, 2), dtype=np.int64)

    def batch(self, step: int) -> Batch:
        """The batch of `step`, counted from 0."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._order, self._epoch = self._shuffled(epoch), epoch
        chosen = self._order[index * self._rows : (index + 1) * self._rows]
        rows = [self._streams[s][0][start : start + self._length + 1] for s, start in chosen]
        tokens_RL1 = torch.from_numpy(np.stack(rows).astype(np.int64))
        input_RL = tokens_RL1[:, :-1].contiguous()
        numbers_RL = document_numbers(tokens_RL1, self._end, self._im_start)[:, :-1].contiguous()
        return Batch(input_RL, tokens_RL1[:, 1:].contiguous(), numbers_RL)

    def _shuffled(self, epoch: int) -> np.ndarray:
        generator = np.random.default_rng((self._seed, epoch))
        order = []
        for index, (tokens, copies) in enumerate(self._streams):
            count = max(0, (len(tokens) - 1) // self._length - 1)
            for _ in range(copies):
                starts = generator.integers(self._length) + self._length * np.arange(count)
                order.append(np.stack([np.full(count, index), starts], axis=1))
        return generator.permutation(np.concatenate(order))


def evaluation_batches(stream: np.ndarray, tokenizer: Tokenizer, rows: int, length: int) -> Iterable[Batch]:
    """Every token of a stream once, in order, as a target; a short last row is a batch of its own."""
    end, im_start = special_id(tokenizer, END_OF_TEXT), special_id(tokenizer, IM_START)
    tokens = torch.from_numpy(stream.astype(np.int64))
    full = (len(tokens) - 1) // length
    pieces = [(r * length, min(rows, full - r), length) for r in range(0, full, rows)]
    if (rest := len(tokens) - 1 - full * length) > 0:
        pieces.append((full * length, 1, rest))
    for start, count, width in pieces:
        input_RL = tokens[start : start + count * width].view(count, width)
        target_RL = tokens[start + 1 : start + 1 + count * width].view(count, width)
        yield Batch(input_RL, target_RL, document_numbers(input_RL, end, im_start))


def bytes_per_token(tokenizer: Tokenizer) -> torch.Tensor:
    """How many bytes of text each token id stands for (V,); special tokens for none."""
    special = set(tokenizer.get_added_tokens_decoder())
    ids = range(tokenizer.get_vocab_size())
    # A byte-level vocabulary spells every byte as one character.
    return torch.tensor([0 if i in special else len(tokenizer.id_to_token(i) or "") for i in ids])
