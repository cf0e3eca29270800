"""A model in every format: bits per byte of its held-out text, here and in llama.cpp.

    python benchmarks/quality.py --llama BUILD/bin --json benchmarks/quality_bundled.json

    moebius train recipes/blocks.toml --out DIR
    python benchmarks/quality.py --model DIR --llama BUILD/bin --json benchmarks/quality_blocks.json

The text is what recipes/stdlib holds out of Python's standard library, in chunks whose second half
is scored. Each format is a GGUF file that `moebius quantize` writes, computed as it is served, in
bfloat16, and in float32. With --llama, llama.cpp reads the same files and the same tokens, and its
llama-quantize makes files of more types, which both read too. Divergence is Kullback-Leibler's from
the model in float32, in nats a token.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from llama_divergence import Coded, Said, Text, divergence
from moebius.inspect.corpus import Document
from moebius.models.hub import resolve_model
from moebius.quantize.export import write_model
from moebius.quantize.recipe import RECIPES
from moebius.text import load_text
from readings import Ours
from records import processor, save

CHUNK = 512
KINDS = ("library", "docs")
CACHE_BYTES = 2**26
QUANTIZE_TYPES = ("Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K", "IQ4_XS", "IQ4_NL", "Q4_0")
"""That llama-quantize makes, some of `moebius quantize`'s among them: who makes them better?"""
PLAIN = ("float32", "bfloat16", "float32, KV cache in int8", "bfloat16, KV cache in int8")
ENGINES = ("moebius", "moebius, float32", "llama.cpp")


class File(NamedTuple):
    """A model in one format, and who quantised it."""

    format: str
    by: str
    path: Path


def held_out() -> list[Document]:
    """What was not trained on, in the order of its paths."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "recipes" / "stdlib"))
    from prepare import read_library

    every = (each for each in read_library() if each.split != "train" and each.kind in KINDS)
    return [Document(each.path, each.kind, each.text) for each in every]


def files(model: Path, folder: Path, llama: Path | None) -> Iterator[File]:
    """The model in every format, one after the other; the next one takes its place."""
    plain = folder / "f32.gguf"
    write_model(model, plain, "f32")
    yield File("f32", "moebius", plain)
    for name in RECIPES:
        path = folder / f"{name}.gguf"
        write_model(model, path, name)
        yield File(name, "moebius", path)
        path.unlink()
    if llama is None:
        return
    for name in QUANTIZE_TYPES:
        path = folder / f"{name}.gguf"
        command = [str(llama / "llama-quantize"), str(plain), str(path), name]
        subprocess.run(command, check=True, capture_output=True)
        yield File(name.lower(), "llama.cpp", path)
        path.unlink()


class Judge:
    """Has engines read the held-out chunks, and tells how far they are from the model in float32.

    base: a file to write what llama.cpp's tool needs to know
    """

    def __init__(self, model: Path, base: Path, given: argparse.Namespace) -> None:
        self._model = model
        self._base = base
        self._given = given
        tokenizer, _ = load_text(model)
        self.text = Text.of(held_out(), tokenizer, CHUNK, given.chunks)
        self.tokens = sum(map(len, self.text.targets))
        self.bytes = sum(
            len(tokenizer.token_bytes(int(token))) for ids in self.text.targets for token in ids
        )
        rows = self.text.read(self._reader(model, "float32"))
        self.text.coded = [Coded.of(rows_LV) for rows_LV in rows]
        self.text.write(base)

    def _reader(self, path: Path, dtype: str, cache: str = "auto") -> Ours:
        limits = {"threads": self._given.threads, "kv_cache_memory_bytes": CACHE_BYTES}
        return Ours(path, CHUNK, dtype=dtype, kv_cache_dtype=cache, **limits)

    def _record(self, said: Said) -> dict[str, Any]:
        bits = math.log2(said.perplexity) * self.tokens / self.bytes
        return {"bits_per_byte": bits, **said._asdict()}

    def ours(self, path: Path, dtype: str, cache: str = "auto") -> dict[str, Any]:
        reader = self._reader(path, dtype, cache)
        return {
            "weight_bytes": reader.weight_bytes,
            **self._record(self.text.judge(self.text.read(reader))),
        }

    def plain(self) -> list[dict[str, Any]]:
        """The model as it is, and what a cache in int8 costs it."""
        found = []
        for label in PLAIN:
            dtype, _, cache = label.partition(", KV cache in ")
            found.append({"label": label, **self.ours(self._model, dtype, cache or "auto")})
        return found

    def of(self, file: File) -> dict[str, Any]:
        """What each engine makes of a file."""
        found: dict[str, Any] = {"format": file.format, "quantised_by": file.by}
        found["moebius"] = self.ours(file.path, "bfloat16")
        found["moebius, float32"] = self.ours(file.path, "float32")
        if self._given.llama is not None:
            tool = self._given.llama / "llama-perplexity"
            said = divergence(tool, file.path, self._base, CHUNK, self._given.threads)
            found["llama.cpp"] = self._record(said)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="bundled", help="a directory, or bundled")
    parser.add_argument("--llama", type=Path, help="the folder of llama.cpp's programs")
    parser.add_argument("--chunks", type=int, default=24, help=f"of {CHUNK} tokens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    model = resolve_model(given.model)
    with tempfile.TemporaryDirectory() as folder:
        judge = Judge(model, Path(folder) / "base", given)
        record: dict[str, Any] = {"processor": processor(), "chunk": CHUNK}
        record |= {"tokens": judge.tokens, "bytes": judge.bytes, "plain": judge.plain()}
        first = record["plain"][0]["bits_per_byte"]
        for each in record["plain"]:
            print(_line(each, each["label"], first), flush=True)
        record["formats"] = []
        for file in files(model, Path(folder), given.llama):
            found = judge.of(file)
            record["formats"].append(found)
            for label in (label for label in ENGINES if label in found):
                line = _line(found[label], f"{file.format} by {file.by}: {label}", first)
                print(line, flush=True)
    save(given.json, record)


def _line(figures: dict[str, Any], label: str, first: float) -> str:
    bits = figures["bits_per_byte"]
    return (
        f"{label:40} {bits:.4f} bits per byte ({100 * (bits / first - 1):+.3f} %)  "
        f"divergence {figures['mean_divergence']:.6f}  same {figures['same_choice']:.2%}"
    )


if __name__ == "__main__":
    main()
