"""Documents as memory-mapped tokens, and the batch of every step.

A stream is one file of token ids: every document is preceded by the end-of-text token, and one more
stands at the end. A batch is a pure function of (streams, mixture, seed, step): there is no reader
state, so training resumes at any step by naming it. Shape suffixes: R rows, L tokens in a row.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from tokenizers import Tokenizer

from moebius.errors import ConfigError, TokenizerError
from moebius.files import anyone, begins_with, write_file
from moebius.text import Tokenizer as TextTokenizer
from moebius.text.pieces import CONTEXT, tokens_behind
from moebius.train.corpus import SPLITS, Corpus
from moebius.train.recipe import Recipe
from moebius.train.tokenizer import IM_START, read_tokenizer, special_id, train_tokenizer

# The kind of text whose special tokens count as such.
CHAT = "chat"
# Bytes of text that are tokenised at a time.
_PIECE = 2**21
_FACTS = "data.json"
_OUR_FACTS = begins_with(b'{\n  "key": "')


class Batch(NamedTuple):
    """Rows of tokens, what follows each, and the number of its document within the row, from 0."""

    input_RL: torch.Tensor
    target_RL: torch.Tensor
    document_RL: torch.Tensor

    def part(self, index: int, of: int) -> "Batch":
        """Micro-batch `index` of so many of equal size."""
        rows = len(self.input_RL) // of
        here = slice(index * rows, (index + 1) * rows)
        return Batch(*(x[here] for x in self))

    def to(self, device: torch.device) -> "Batch":
        """There; a GPU copies by itself, from pinned memory, and nobody waits."""
        if device.type != "cuda":
            return Batch(*(x.to(device) for x in self))
        return Batch(*(x.pin_memory().to(device, non_blocking=True) for x in self))


@dataclass(frozen=True)
class PreparedData:
    """A tokenizer and the streams made with it, by kind.

    facts         what the model card says about them
    end_of_text   stands between documents
    im_start      begins a conversation, where the tokenizer has it
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
    def token_bytes(self) -> list[bytes]:
        """The bytes of text that each token id stands for; special tokens for none."""
        return bytes_of_tokens(self.tokenizer)

    @cached_property
    def bytes_V(self) -> torch.Tensor:
        return bytes_per_token(self.tokenizer)

    def untrained(self, recipe: Recipe) -> list[str]:
        """A line on each part of the corpus that is, unasked, not trained on or not measured."""
        reasons = {
            "no UTF-8 text": self.facts.get("skipped_files"),
            "nothing but white space": self.facts.get("empty_files"),
        }
        lines = []
        for what, names in reasons.items():
            if names:
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                lines.append(f"passed over, {what}: {', '.join(names[:3])}{more}")
        for kind in recipe.corpus.files:
            if note := self._untrained_of(kind, recipe):
                lines.append(f"corpus.files.{kind}: {note}")
        return lines

    def _untrained_of(self, kind: str, recipe: Recipe) -> str:
        nothing = {"bytes": 0, "tokens": 0}
        trained = self.facts["sizes"]["train"].get(kind, nothing)
        heldout = self.facts["sizes"]["heldout"].get(kind, nothing)
        length = recipe.training.row_length
        wanted = recipe.mixture.get(kind, 1) > 0
        total = trained["bytes"] + heldout["bytes"]
        if not total:
            return "there is no text"
        if wanted and not trained["bytes"]:
            return "all of it is held out; none is trained on"
        if wanted and not rows_in(trained["tokens"], length):
            return (
                f"{trained['tokens']} tokens are less than two rows of {length}; none is trained on"
            )
        if not heldout["bytes"]:
            return "none of its documents is held out, so that it is not measured"
        share = heldout["bytes"] / total
        if share > 0.5:
            wish = recipe.corpus.heldout_share
            return f"{share:.0%} of it is held out, not {wish:.1%}: whole documents are"
        return ""


def prepare(recipe: Recipe, folder: Path, tokenizer: Path | None = None) -> PreparedData:
    """Tokenizer and token files for `recipe`, made in `folder` unless they are there already.

    Files that were made from another recipe or corpus are made anew. `tokenizer` is a directory
    whose tokenizer is used whatever the recipe says.
    """
    corpus = Corpus(recipe.corpus)
    path = recipe.given_tokenizer() if tokenizer is None else tokenizer / "tokenizer.json"
    given = None if path is None else read_tokenizer(path)
    spelled = "" if given is None else given.to_str()
    made_from = (recipe.corpus, recipe.tokenizer, spelled, corpus.key())
    key = hashlib.sha256(repr(made_from).encode()).hexdigest()
    facts = _facts(folder, key)
    if facts is None:
        folder.mkdir(parents=True, exist_ok=True)
        # It is the first file there, which says whose the others are, and the last.
        _write_facts(folder, "", {})
        facts = _write(recipe, corpus, given, folder)
        _write_facts(folder, key, facts)
    return _mapped(recipe, folder, facts)


def prepared(recipe: Recipe, folder: Path) -> PreparedData:
    """What `prepare` has written into `folder`, wherever the texts lie that it was made from.

    Raises ConfigError where nothing whole is there.
    """
    facts = _facts(folder)
    if facts is None:
        raise ConfigError(f"{folder} holds no prepared text")
    return _mapped(recipe, folder, facts)


def _mapped(recipe: Recipe, folder: Path, facts: dict[str, Any]) -> PreparedData:
    made = read_tokenizer(folder / "tokenizer.json")
    return PreparedData(
        tokenizer=made,
        train=_mapped_streams(folder, "train", facts),
        heldout=_mapped_streams(folder, "heldout", facts),
        facts=facts,
        end_of_text=special_id(made, recipe.tokenizer.end_of_text),
        im_start=made.token_to_id(IM_START),
    )


def _mapped_streams(folder: Path, split: str, facts: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A split's streams of tokens by kind of text."""
    dtype = token_dtype(facts["vocab_size"])
    return {
        kind: np.memmap(_stream_path(folder, split, kind), dtype, "r")
        for kind in facts["sizes"][split]
    }


def holds_run(folder: Path) -> bool:
    """Whether `prepare` has written into a folder, to the end or not."""
    path = folder / _FACTS
    return path.is_file() and _OUR_FACTS(path)


def _write_facts(folder: Path, key: str, facts: Mapping[str, Any]) -> None:
    text = json.dumps({"key": key, "facts": facts}, indent=2) + "\n"
    write_file(folder / _FACTS, text, ours=anyone)


def _facts(folder: Path, key: str | None = None) -> dict[str, Any] | None:
    """What `_write` said of the files in a folder; None unless all are whole, and made from what
    `key` says (None: from anything)."""
    try:
        found = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
        if not found["key"] or key not in (None, found["key"]):
            return None
        facts: dict[str, Any] = found["facts"]
        width = np.dtype(token_dtype(facts["vocab_size"])).itemsize
        for split in SPLITS:
            for kind, size in facts["sizes"][split].items():
                if _stream_path(folder, split, kind).stat().st_size != size["tokens"] * width:
                    return None
        read_tokenizer(folder / "tokenizer.json")
    except (FileNotFoundError, TokenizerError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return facts


def _stream_path(folder: Path, split: str, kind: str) -> Path:
    return folder / f"{split}.{kind}.bin"


def _write(recipe: Recipe, corpus: Corpus, given: Tokenizer | None, folder: Path) -> dict[str, Any]:
    """Write tokenizer.json and a stream for each split and kind; what the card says of them."""
    _check_splits(corpus)
    if given is None:
        texts = (each.text for each in corpus if each.split == "train" and each.kind != CHAT)
        tokenizer = train_tokenizer(texts, recipe.tokenizer.vocab_size)
    else:
        tokenizer = given
    tokenizer.save(str(folder / "tokenizer.json"))
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    end = special_id(tokenizer, recipe.tokenizer.end_of_text)
    digest = hashlib.sha256()
    streams: dict[tuple[str, str], _Stream] = {}
    with ExitStack() as stack:
        for document in corpus:
            for part in (document.split, document.kind, document.path, document.text):
                encoded = part.encode()
                digest.update(len(encoded).to_bytes(8, "little") + encoded)
            place = (document.split, document.kind)
            if place not in streams:
                file = _stream_path(folder, *place)
                chat = document.kind == CHAT
                stream = _Stream(file, tokenizer, end, token_dtype(vocab_size), chat=chat)
                streams[place] = stack.enter_context(stream)
            streams[place].add(document.text, goes_on=document.goes_on)
    sizes: dict[str, dict[str, dict[str, int]]] = {split: {} for split in SPLITS}
    for (split, kind), stream in streams.items():
        sizes[split][kind] = stream.size
    return {
        "corpus_sha256": digest.hexdigest(),
        "vocab_size": vocab_size,
        "sizes": sizes,
        "skipped_files": corpus.skipped,
        "empty_files": corpus.empty,
    }


def _check_splits(corpus: Corpus) -> None:
    """ConfigError for a corpus without text to train on, or without held-out text.

    It reads as far as it takes to know.
    """
    found = set()
    for document in corpus:
        found.add(document.split)
        if len(found) == len(SPLITS):
            return
    if "train" not in found:
        raise ConfigError("the corpus holds no text to train on")
    raise ConfigError(
        "the corpus holds no held-out text; raise corpus.heldout_share, or name a single file as "
        "a kind of text: of that the end is held out"
    )


def token_dtype(vocab_size: int) -> type[np.unsignedinteger[Any]]:
    return np.uint16 if vocab_size <= 2**16 else np.uint32


class _Piece(NamedTuple):
    """A text, or a piece of one: `before` is the end of the piece before it."""

    text: str
    before: str = ""
    goes_on: bool = False


def pack(
    texts: Iterable[str], tokenizer: Tokenizer, end_of_text: int, *, chat: bool = False
) -> np.ndarray:
    """All texts as one array: the end-of-text token before each and at the end.

    A special token spelled out in a text is plain text, but in conversations, which the template
    made.
    """
    pieces = [_Piece(text) for text in texts]
    return np.concatenate(([end_of_text], *_encoded(pieces, tokenizer, end_of_text, chat)))


def _encoded(
    texts: Sequence[_Piece], tokenizer: Tokenizer, end_of_text: int, chat: bool
) -> Iterator[np.ndarray]:
    """The tokens of each, and the end-of-text token behind each that does not go on."""
    tokenizer.encode_special_tokens = not chat

    def encode(batch: list[str]) -> list[list[int]]:
        encodings = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    contexts = encode([piece.before for piece in texts])
    wholes = encode([piece.before + piece.text for piece in texts])
    for piece, context, whole in zip(texts, contexts, wholes, strict=True):
        own = tokens_behind(context, whole)
        if own is None:
            own = encode([piece.text])[0]
        if not piece.goes_on:
            own = [*own, end_of_text]
        yield np.array(own, np.uint32)


class _Stream:
    """A file of tokens that is written as texts come, some at a time.

    size   how many documents, bytes of text and tokens it holds by now
    """

    def __init__(
        self, path: Path, tokenizer: Tokenizer, end_of_text: int, dtype: type[Any], *, chat: bool
    ) -> None:
        self.size = {"documents": 0, "bytes": 0, "tokens": 0}
        self._file = path.open("wb")
        self._dtype = dtype
        self._tokenizer = tokenizer
        self._end = end_of_text
        self._chat = chat
        self._waiting: list[_Piece] = []
        self._before = ""

    def __enter__(self) -> Self:
        self._put(np.array([self._end]))
        return self

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        with self._file:
            if not failed:
                self._flush()

    def add(self, text: str, *, goes_on: bool) -> None:
        """A text, or the next piece of one that `goes_on`."""
        self._waiting.append(_Piece(text, self._before, goes_on))
        self._before = text[-CONTEXT:] if goes_on else ""
        before = self.size["bytes"]
        self.size["bytes"] += len(text.encode())
        self.size["documents"] += not goes_on
        if before // _PIECE != self.size["bytes"] // _PIECE:
            self._flush()

    def _flush(self) -> None:
        for tokens in _encoded(self._waiting, self._tokenizer, self._end, self._chat):
            self._put(tokens)
        self._waiting = []

    def _put(self, tokens: np.ndarray) -> None:
        self._file.write(tokens.astype(self._dtype).tobytes())
        self.size["tokens"] += len(tokens)


def document_numbers(
    tokens_RL: torch.Tensor, end_of_text: int, im_start: int | None
) -> torch.Tensor:
    """Number the documents within each row, from 0 (R, L).

    A document starts at the end-of-text token before it, so that its first token is predicted from
    something; where a conversation follows, it starts at <|im_start|>, which is how the chat
    template begins when the model is served.
    """
    is_end_RL = tokens_RL == end_of_text
    if im_start is None:
        return is_end_RL.cumsum(1)
    before_chat_RL = torch.zeros_like(is_end_RL)
    before_chat_RL[:, :-1] = is_end_RL[:, :-1] & (tokens_RL[:, 1:] == im_start)
    starts_RL = is_end_RL & ~before_chat_RL
    starts_RL[:, 1:] |= before_chat_RL[:, :-1]
    return starts_RL.cumsum(1)


def rows_in(tokens: int, length: int) -> int:
    """Rows of a pass over a stream of so many tokens, wherever within a row's length it begins."""
    return max(0, (tokens - 1) // length - 1)


class Batches:
    """The training batches of a recipe, by step.

    An epoch passes over each kind's stream as often as the mixture says, each pass cut into rows at
    another offset, and shuffles all rows together. Offsets and order follow from (seed, epoch)
    alone.
    """

    def __init__(
        self, data: PreparedData, mixture: Mapping[str, int], rows: int, length: int, seed: int
    ) -> None:
        for kind, copies in mixture.items():
            if copies and kind not in data.train:
                raise ConfigError(
                    f"mixture.{kind} names no training stream; there are {', '.join(data.train)}"
                )
        kinds = sorted(data.train)
        self._streams = [data.train[kind] for kind in kinds]
        self._copies = [mixture.get(kind, 1) for kind in kinds]
        self._rows = rows
        self._length = length
        self._seed = seed
        self._end = data.end_of_text
        self._im_start = data.im_start
        rows_of_epoch = 0
        for stream, copies in zip(self._streams, self._copies, strict=True):
            rows_of_epoch += copies * rows_in(len(stream), length)
        self.steps_per_epoch = rows_of_epoch // rows
        if not self.steps_per_epoch:
            raise ConfigError(
                f"the training text has fewer than {rows} rows of {length} tokens, not one batch"
            )
        self._epoch = -1
        self._order = np.empty((0, 2), dtype=np.int64)

    def batch(self, step: int) -> Batch:
        """The batch of `step`, counted from 0."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._order = self._shuffled(epoch)
            self._epoch = epoch
        chosen = self._order[index * self._rows : (index + 1) * self._rows]
        rows = [self._streams[s][start : start + self._length + 1] for s, start in chosen]
        tokens_RL1 = torch.from_numpy(np.stack(rows).astype(np.int64))
        input_RL = tokens_RL1[:, :-1].contiguous()
        numbers_RL = document_numbers(tokens_RL1, self._end, self._im_start)[:, :-1].contiguous()
        return Batch(input_RL, tokens_RL1[:, 1:].contiguous(), numbers_RL)

    def _shuffled(self, epoch: int) -> np.ndarray:
        generator = np.random.default_rng((self._seed, epoch))
        order = []
        for index, stream in enumerate(self._streams):
            count = rows_in(len(stream), self._length)
            for _ in range(self._copies[index]):
                starts = generator.integers(self._length) + self._length * np.arange(count)
                order.append(np.stack([np.full(count, index), starts], axis=1))
        return generator.permutation(np.concatenate(order))


def evaluation_batches(
    stream: np.ndarray, data: PreparedData, rows: int, length: int
) -> Iterator[Batch]:
    """Every token of a stream once, in order, as a target; a short last row is its own batch."""
    full = (len(stream) - 1) // length
    pieces = [(r * length, min(rows, full - r), length) for r in range(0, full, rows)]
    rest = len(stream) - 1 - full * length
    if rest > 0:
        pieces.append((full * length, 1, rest))
    for start, count, width in pieces:
        tokens = torch.from_numpy(stream[start : start + count * width + 1].astype(np.int64))
        input_RL = tokens[:-1].view(count, width)
        target_RL = tokens[1:].view(count, width)
        document_RL = document_numbers(input_RL, data.end_of_text, data.im_start)
        yield Batch(input_RL, target_RL, document_RL)


def bytes_of_tokens(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes of text that each token id stands for; special tokens for none."""
    reader = TextTokenizer(tokenizer)
    return [
        b"" if i in reader.special_ids else reader.token_bytes(i) for i in range(reader.vocab_size)
    ]


def bytes_per_token(tokenizer: Tokenizer) -> torch.Tensor:
    """How many bytes of text each token id stands for (V,)."""
    return torch.tensor([len(each) for each in bytes_of_tokens(tokenizer)])
