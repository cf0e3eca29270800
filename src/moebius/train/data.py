"""Documents as memory-mapped tokens, and the batch of every step.

A stream is one file of token ids: every document is preceded by the end-of-text token, and one more stands at the end.
A batch is a pure function of (streams, mixture, seed, step): there is no reader state, so training resumes at any step
by naming it. Shape suffixes: R rows, L tokens in a row.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer

from moebius.config import require
from moebius.files import anyone, write_file
from moebius.text import Tokenizer as TextTokenizer
from moebius.train.corpus import SPLITS, Corpus
from moebius.train.recipe import Recipe
from moebius.train.tokenizer import IM_START, given_tokenizer, special_id, train_tokenizer

# The kind of text whose special tokens count as such.
CHAT = "chat"
# Bytes of text that are tokenised at a time.
_PIECE = 2**21


class Batch(NamedTuple):
    """Rows of tokens and what follows each; `document_RL` numbers the documents within a row, from 0."""

    input_RL: torch.Tensor
    target_RL: torch.Tensor
    document_RL: torch.Tensor

    def part(self, index: int, of: int) -> "Batch":
        """Micro-batch `index` of so many of equal size."""
        rows = len(self.input_RL) // of
        here = slice(index * rows, (index + 1) * rows)
        return Batch(*(x[here] for x in self))

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(x.to(device, non_blocking=True) for x in self))


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


def prepare(recipe: Recipe, folder: Path, tokenizer: Path | None = None) -> PreparedData:
    """Tokenizer and token files for `recipe`, made in `folder` unless they are there already.

    Files that were made from another recipe or corpus are made anew. `tokenizer` is a directory whose tokenizer is used
    whatever the recipe says.
    """
    corpus = Corpus(recipe.corpus)
    given = given_tokenizer(recipe, tokenizer)
    spelled = "" if given is None else given.to_str()
    key = hashlib.sha256(repr((recipe.corpus, recipe.tokenizer, spelled, corpus.key())).encode()).hexdigest()
    done = folder / "data.json"
    if not (done.exists() and json.loads(done.read_text())["key"] == key):
        folder.mkdir(parents=True, exist_ok=True)
        done.unlink(missing_ok=True)
        facts = _write(recipe, corpus, given, folder)
        write_file(done, json.dumps({"key": key, "facts": facts}, indent=2) + "\n", ours=anyone)
    facts = json.loads(done.read_text())["facts"]
    made = Tokenizer.from_file(str(folder / "tokenizer.json"))
    dtype = token_dtype(facts["vocab_size"])
    streams: dict[str, dict[str, np.ndarray]] = {
        split: {kind: np.memmap(folder / f"{split}.{kind}.bin", dtype, "r") for kind in facts["sizes"][split]}
        for split in SPLITS
    }
    end = special_id(made, recipe.tokenizer.end_of_text)
    return PreparedData(made, **streams, facts=facts, end_of_text=end, im_start=made.token_to_id(IM_START))


def _write(recipe: Recipe, corpus: Corpus, given: Tokenizer | None, folder: Path) -> dict[str, Any]:
    """Write tokenizer.json and a stream for each split and kind; what the model card says of them."""
    require(any(document.split == "train" for document in corpus), "the corpus holds no text to train on")
    texts = (document.text for document in corpus if document.split == "train" and document.kind != CHAT)
    tokenizer = train_tokenizer(texts, recipe.tokenizer.vocab_size) if given is None else given
    tokenizer.save(str(folder / "tokenizer.json"))
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    end, digest = special_id(tokenizer, recipe.tokenizer.end_of_text), hashlib.sha256()
    sizes: dict[str, dict[str, dict[str, int]]] = {split: {} for split in SPLITS}
    waiting: dict[tuple[str, str], list[str]] = defaultdict(list)

    def flush(split: str, kind: str) -> None:
        size = sizes[split][kind]
        tokens = pack(waiting.pop((split, kind), []), tokenizer, end, chat=kind == CHAT)
        tokens = tokens[1:] if size["tokens"] else tokens  # the last piece's end is this one's beginning
        with (folder / f"{split}.{kind}.bin").open("ab" if size["tokens"] else "wb") as file:
            file.write(tokens.astype(token_dtype(vocab_size)).tobytes())
        size["tokens"] += len(tokens)

    for document in corpus:
        for part in document:
            digest.update(len(part.encode()).to_bytes(8, "little") + part.encode())
        split, kind, _, text = document
        if text:
            size = sizes[split].setdefault(kind, {"documents": 0, "bytes": 0, "tokens": 0})
            waiting[split, kind].append(text)
            before, size["bytes"] = size["bytes"], size["bytes"] + len(text.encode())
            size["documents"] += 1
            if before // _PIECE != size["bytes"] // _PIECE:
                flush(split, kind)
    for place in list(waiting):
        flush(*place)
    require(bool(sizes["heldout"]), "the corpus holds no held-out text; raise corpus.heldout_share")
    facts = {"corpus_sha256": digest.hexdigest(), "vocab_size": vocab_size, "sizes": sizes}
    return facts | {"skipped_files": corpus.skipped}


def token_dtype(vocab_size: int) -> type[np.unsignedinteger[Any]]:
    return np.uint16 if vocab_size <= 2**16 else np.uint32


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
        for kind, copies in mixture.items():
            known = f"there are {', '.join(data.train)}"
            require(not copies or kind in data.train, f"mixture.{kind} names no training stream; {known}")
        self._streams = [(data.train[kind], mixture.get(kind, 1)) for kind in sorted(data.train)]
        self._rows, self._length, self._seed = rows, length, seed
        self._end, self._im_start = data.end_of_text, data.im_start
        per_stream = [copies * max(0, (len(t) - 1) // length - 1) for t, copies in self._streams]
        self.steps_per_epoch = sum(per_stream) // rows
        few = f"the training text has fewer than {rows} rows of {length} tokens, not one batch"
        require(self.steps_per_epoch > 0, few)
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
