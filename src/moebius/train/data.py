"""Documents as memory-mapped tokens, and the batch of every step.

A stream is one file of token ids: every document is preceded by the end-of-text token, and one more stands at the end.
A batch is a pure function of (streams, mixture, seed, step): there is no reader state, so training resumes at any step
by naming it. Shape suffixes: R rows, L tokens in a row.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from tokenizers import Tokenizer

from moebius.config import require
from moebius.errors import ConfigError
from moebius.models.weights import publish
from moebius.text import Tokenizer as TextTokenizer
from moebius.train.chat import conversations
from moebius.train.corpus import Corpus, Document, FileCorpus, add_document, read_corpus
from moebius.train.recipe import Recipe
from moebius.train.tokenizer import IM_START, given_tokenizer, render_chat, special_id, train_tokenizer

# Bytes of text that are tokenised at a time.
_PIECE = 2**21


@dataclass(frozen=True)
class Batch:
    """Rows of tokens and what follows each; `document_RL` numbers the documents within a row, from 0."""

    input_RL: torch.Tensor
    target_RL: torch.Tensor
    document_RL: torch.Tensor

    def part(self, index: int, of: int) -> Batch:
        """Micro-batch `index` of so many of equal size."""
        rows = len(self.input_RL) // of
        here = slice(index * rows, (index + 1) * rows)
        return Batch(self.input_RL[here], self.target_RL[here], self.document_RL[here])

    def to(self, device: torch.device) -> Batch:
        return Batch(*(x.to(device, non_blocking=True) for x in (self.input_RL, self.target_RL, self.document_RL)))


@dataclass(frozen=True)
class PreparedData:
    """A tokenizer and the streams made with it, by kind; `facts` is what the model card says about them.

    end_of_text stands between documents; im_start begins a conversation where the tokenizer has it.
    """

    tokenizer: Tokenizer
    train: dict[str, np.ndarray]
    heldout: dict[str, np.ndarray]
    facts: dict[str, Any]
    end_of_text: int
    im_start: int | None

    @property
    def vocab_size(self) -> int:
        return int(self.facts["vocab_size"])

    @cached_property
    def bytes_V(self) -> torch.Tensor:
        return bytes_per_token(self.tokenizer)


def prepare(recipe: Recipe, folder: Path, root: Path | None = None, tokenizer: Path | None = None) -> PreparedData:
    """Tokenizer and token files for `recipe`, made in `folder` unless they are there already.

    Files that were made from another recipe, corpus or Python are made anew. `root` is the standard library to read,
    this Python's by default; `tokenizer` a directory whose tokenizer is used whatever the recipe says.
    """
    corpus: Corpus | FileCorpus
    if recipe.corpus.files:
        corpus = FileCorpus(recipe.corpus.files, recipe.corpus.text_key, recipe.corpus.heldout_share)
    else:
        corpus = read_corpus(recipe.corpus.heldout_share, root)
    given = given_tokenizer(recipe, tokenizer)
    spelled = "" if given is None else given.to_str()
    key = hashlib.sha256(repr((recipe.corpus, recipe.tokenizer, spelled, corpus.key)).encode()).hexdigest()
    done = folder / "data.json"
    if not (done.exists() and json.loads(done.read_text())["key"] == key):
        folder.mkdir(parents=True, exist_ok=True)
        done.unlink(missing_ok=True)
        facts = _write(recipe, corpus, given, folder)
        partial = folder / ".data.json"
        partial.write_text(json.dumps({"key": key, "facts": facts}, indent=2) + "\n")
        publish(partial, done)
    facts = json.loads(done.read_text())["facts"]
    made = Tokenizer.from_file(str(folder / "tokenizer.json"))
    end = special_id(made, recipe.tokenizer.end_of_text)
    train, heldout = (_open(folder, split, facts) for split in ("train", "heldout"))
    return PreparedData(made, train, heldout, facts, end, made.token_to_id(IM_START))


def _write(recipe: Recipe, corpus: Corpus | FileCorpus, given: Tokenizer | None, folder: Path) -> dict[str, Any]:
    require(any(split == "train" for split, _ in corpus), "the corpus holds no text to train on")
    tokenizer = given
    if tokenizer is None:
        texts = (document.text for split, document in corpus if split == "train")
        tokenizer = train_tokenizer(texts, recipe.tokenizer.vocab_size)
    tokenizer.save(str(folder / "tokenizer.json"))
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    digest, streams = hashlib.sha256(), _Streams(folder, tokenizer, recipe.tokenizer.end_of_text, vocab_size)
    chats: list[Document] = []
    if isinstance(corpus, Corpus):
        found = conversations(corpus.train, recipe.corpus.chat_examples, recipe.corpus.seed)
        chats = [Document(f"chat/{i}", "chat", render_chat(chat)) for i, chat in enumerate(found)]
    for split, document in chain(corpus, (("train", chat) for chat in chats)):
        add_document(digest, split, document)
        streams.add(split, document)
    sizes = streams.close()
    require(bool(sizes["heldout"]), "the corpus holds no held-out text; raise corpus.heldout_share")
    facts = {"corpus_sha256": digest.hexdigest(), "vocab_size": vocab_size, "sizes": sizes}
    skipped = {"skipped_files": corpus.skipped} if isinstance(corpus, FileCorpus) else {}
    return facts | skipped | {"python_version": platform.python_version()}


class _Streams:
    """Documents on their way into one file a split and kind."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, end_of_text: str, vocab_size: int) -> None:
        self._folder, self._tokenizer = folder, tokenizer
        self._end = special_id(tokenizer, end_of_text)
        self._dtype = token_dtype(vocab_size)
        self._files: dict[tuple[str, str], BinaryIO] = {}
        self._waiting: dict[tuple[str, str], list[str]] = {}
        self.sizes: dict[str, dict[str, dict[str, int]]] = {"train": {}, "heldout": {}}

    def add(self, split: str, document: Document) -> None:
        if not document.text:
            return
        place = (split, document.kind)
        size = self.sizes[split].setdefault(document.kind, {"documents": 0, "bytes": 0, "tokens": 1})
        if place not in self._files:
            self._files[place] = (self._folder / f"{split}.{document.kind}.bin").open("wb")
            self._files[place].write(np.array([self._end], self._dtype).tobytes())
        self._waiting.setdefault(place, []).append(document.text)
        before, size["bytes"] = size["bytes"], size["bytes"] + len(document.text.encode())
        size["documents"] += 1
        if before // _PIECE != size["bytes"] // _PIECE:
            self._flush(place)

    def _flush(self, place: tuple[str, str]) -> None:
        tokens = pack(self._waiting.pop(place, []), self._tokenizer, self._end, chat=place[1] == "chat")[1:]
        self._files[place].write(tokens.astype(self._dtype).tobytes())
        self.sizes[place[0]][place[1]]["tokens"] += len(tokens)

    def close(self) -> dict[str, dict[str, dict[str, int]]]:
        for place, file in self._files.items():
            self._flush(place)
            file.close()
        return self.sizes


def token_dtype(vocab_size: int) -> type[np.unsignedinteger[Any]]:
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def _open(folder: Path, split: str, facts: dict[str, Any]) -> dict[str, np.ndarray]:
    dtype = token_dtype(facts["vocab_size"])
    return {kind: np.memmap(folder / f"{split}.{kind}.bin", dtype, "r") for kind in facts["sizes"][split]}


def pack(texts: Iterable[str], tokenizer: Tokenizer, end_of_text: int, *, chat: bool = False) -> np.ndarray:
    """All texts as one array: the end-of-text token before each and at the end.

    A special token spelled out in a text is plain text, but in conversations, which the template made.
    """
    tokenizer.encode_special_tokens = not chat
    parts: list[int] = [end_of_text]
    for encoding in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False):
        parts.extend(encoding.ids)
        parts.append(end_of_text)
    return np.array(parts)


def document_numbers(tokens_RL: torch.Tensor, end_of_text: int, im_start: int | None) -> torch.Tensor:
    """Number the documents within each row, from 0 (R, L).

    A document starts at the end-of-text token before it, so that its first token is predicted from something; where a
    conversation follows, it starts at <|im_start|>, which is how the chat template begins when the model is served.
    """
    is_end_RL = tokens_RL == end_of_text
    if im_start is None:
        return is_end_RL.cumsum(1)
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

    def __init__(self, data: PreparedData, mixture: Mapping[str, int], rows: int, length: int, seed: int) -> None:
        unknown = [kind for kind, copies in mixture.items() if copies and kind not in data.train]
        if unknown:
            raise ConfigError(f"mixture.{unknown[0]} names no training stream; there are {', '.join(data.train)}")
        copies = {kind: mixture.get(kind, 1) for kind in sorted(data.train)}
        self._streams = [(data.train[kind], count) for kind, count in copies.items() if count]
        self._rows, self._length, self._seed = rows, length, seed
        self._end, self._im_start = data.end_of_text, data.im_start
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


def evaluation_batches(stream: np.ndarray, data: PreparedData, rows: int, length: int) -> Iterator[Batch]:
    """Every token of a stream once, in order, as a target; a short last row is a batch of its own."""
    tokens = torch.from_numpy(stream.astype(np.int64))
    full = (len(tokens) - 1) // length
    pieces = [(r * length, min(rows, full - r), length) for r in range(0, full, rows)]
    if (rest := len(tokens) - 1 - full * length) > 0:
        pieces.append((full * length, 1, rest))
    for start, count, width in pieces:
        input_RL = tokens[start : start + count * width].view(count, width)
        target_RL = tokens[start + 1 : start + 1 + count * width].view(count, width)
        yield Batch(input_RL, target_RL, document_numbers(input_RL, data.end_of_text, data.im_start))


def bytes_per_token(tokenizer: Tokenizer) -> torch.Tensor:
    """How many bytes of text each token id stands for (V,); special tokens for none."""
    reader = TextTokenizer(tokenizer)
    ids = range(reader.vocab_size)
    return torch.tensor([0 if i in reader.special_ids else len(reader.token_bytes(i)) for i in ids])
