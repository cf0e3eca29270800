"""The text to train on: which documents there are, and which are held out."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from moebius.config import require
from moebius.errors import ConfigError
from moebius.train.recipe import CorpusRecipe

SPLITS = ("train", "heldout")


class Document(NamedTuple):
    """One text: `split` is one of SPLITS, `path` says where it is from, relative to the folder that was named."""

    split: str
    kind: str
    path: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Text files, folders of them and .jsonl files, by kind; read anew at every pass, never held as a whole.

    In a folder, files that are no UTF-8 text are passed over and counted in `skipped`, and hidden ones are not looked
    at. A document is held out by a hash of its path (and line), unless its JSON object has a `split`; of a kind that is
    one text file, its end is. Raises: ConfigError naming the file, for one that is missing, binary or no JSON.
    """

    recipe: CorpusRecipe
    skipped: list[str] = field(default_factory=list)

    def key(self) -> str:
        """Fingerprint of every file's path, size and time of change."""
        stats = [(kind, name, p.stat().st_size, p.stat().st_mtime_ns) for kind, _, name, p in self._paths()]
        return hashlib.sha256(repr((stats, self.recipe.text_key)).encode()).hexdigest()

    def __iter__(self) -> Iterator[Document]:
        self.skipped.clear()
        kinds = Counter(kind for kind, _, _, _ in self._paths())
        for kind, named, name, path in self._paths():
            if path.suffix == ".jsonl":
                yield from self._lines(kind, name, path)
            elif (whole := self._text(path, named)).strip():
                if kinds[kind] == 1:
                    cut = whole.rfind("\n", 0, int(len(whole) * (1 - self.recipe.heldout_share))) + 1
                    yield Document("train", kind, name, whole[:cut])
                    yield Document("heldout", kind, f"{name}:end", whole[cut:])
                else:
                    yield Document(self._split(name), kind, name, whole)

    def _paths(self) -> Iterator[tuple[str, bool, str, Path]]:
        """Kind, whether the file itself was named, the name, the path; in order."""
        for kind, roots in self.recipe.files.items():
            for root in map(Path, roots):
                require(root.exists(), f"corpus.files.{kind}: {root} does not exist")
                if not root.is_dir():
                    yield kind, True, root.name, root
                    continue
                for path in sorted(p for p in root.rglob("*") if p.is_file()):
                    relative = path.relative_to(root)
                    if not any(part.startswith(".") for part in relative.parts):
                        yield kind, False, relative.as_posix(), path

    def _split(self, path: str) -> str:
        return SPLITS[is_held_out(path, self.recipe.heldout_share)]

    def _text(self, path: Path, named: bool) -> str:
        """The file's text with Unix line ends; "" for one that is skipped."""
        try:
            text = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
        except UnicodeDecodeError:
            text = "\0"
        if "\0" not in text:
            return text
        require(not named, f"{path} is binary: it is no UTF-8 text, or holds a zero byte")
        self.skipped.append(str(path))
        return ""

    def _lines(self, kind: str, name: str, path: Path) -> Iterator[Document]:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                where, place = f"{path}, line {number}", f"{name}:{number}"
                try:
                    entry = json.loads(line)
                    text, split = entry[self.recipe.text_key], entry.get("split", self._split(place))
                except (ValueError, KeyError, TypeError, AttributeError):
                    wanted = f"it must be a JSON object with a text under {self.recipe.text_key!r} (corpus.text_key)"
                    raise ConfigError(f"{where}: {wanted}") from None
                require(isinstance(text, str), f"{where}: {self.recipe.text_key!r} is no text")
                require(split in SPLITS, f"{where}: split is {split!r}; it must be one of {', '.join(SPLITS)}")
                if text.strip():
                    yield Document(split, kind, place, text)


def is_held_out(path: str, share: float) -> bool:
    """By a hash of the path, so that adding or removing a document moves no other."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") / 2**64 < share
