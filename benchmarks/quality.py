"""A model in every format: bits per byte of its held-out text, here and in llama.cpp.

    python benchmarks/quality.py --llama BUILD/bin --json benchmarks/quality_bundled.json

    moebius train recipes/blocks.toml --out DIR
    python benchmarks/quality.py --model DIR --llama BUILD/bin --json benchmarks/quality_blocks.json

The text is what recipes/stdlib holds out of Python's standard library. Each format is a GGUF file
that `moebius quantize` writes, computed as it is served, in bfloat16, and in float32. With --llama,
llama.cpp reads the same files and the same tokens, one after the other, and its llama-quantize
makes files of more types, which both read too. Divergence is Kullback-Leibler's from the model in
float32, in nats a token.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moebius.bench.quality import token_rows
from moebius.inspect.corpus import Document
from moebius.models.hub import resolve_model
from moebius.quantize.export import write_model
from moebius.quantize.recipe import RECIPES
from moebius.text import load_text
from readings import Ours, Reader, Reading, Theirs, compare, llama
from records import processor, save

ROW = 512
KINDS = ("library", "docs")
CACHE_BYTES = 2**26
QUANTIZE_TYPES = ("Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K", "IQ4_XS", "IQ4_NL", "Q4_0")
"""That llama-quantize makes, some of `moebius quantize`'s among them: who makes them better?"""
PLAIN = ("float32", "bfloat16", "float32, KV cache in int8", "bfloat16, KV cache in int8")


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


def files(model: Path, folder: Path, llama_bin: Path | None) -> Iterator[File]:
    """The model in every format, one after the other; the next one takes its place."""
    plain = folder / "f32.gguf"
    write_model(model, plain, "f32")
    yield File("f32", "moebius", plain)
    for name in RECIPES:
        path = folder / f"{name}.gguf"
        write_model(model, path, name)
        yield File(name, "moebius", path)
        path.unlink()
    if llama_bin is None:
        return
    for name in QUANTIZE_TYPES:
        path = folder / f"{name}.gguf"
        command = [str(llama_bin / "llama-quantize"), str(plain), str(path), name]
        subprocess.run(command, check=True, capture_output=True)
        yield File(name.lower(), "llama.cpp", path)
        path.unlink()


class Judge:
    """Reads the held-out rows with the model in float32 and whoever is set beside it."""

    def __init__(
        self, model: Path, documents: Sequence[Document], given: argparse.Namespace
    ) -> None:
        text, _ = load_text(model)
        self._model = model
        self._given = given
        self._vocab = text.vocab_size
        self._sizes = torch.tensor([len(text.token_bytes(i)) for i in range(self._vocab)])
        rows = token_rows(documents, text, ROW, given.max_tokens)
        self._readings = [Reading(row) for row in rows]

    def _ours(self, path: Path, **options: Any) -> Ours:
        threads = self._given.threads
        return Ours(path, ROW, threads=threads, kv_cache_memory_bytes=CACHE_BYTES, **options)

    def plain(self) -> list[dict[str, Any]]:
        """The model as it is, and what a cache in int8 costs it."""
        readers: dict[str, Reader] = {}
        for label in PLAIN:
            dtype, _, cache = label.partition(", KV cache in ")
            readers[label] = self._ours(self._model, dtype=dtype, kv_cache_dtype=cache or "auto")
        found = compare(readers, self._readings, self._sizes)
        return [each.record() for each in found.values()]

    def of(self, file: File) -> dict[str, Any]:
        """What each engine makes of a file."""
        readers: dict[str, Reader] = {"model": self._ours(self._model, dtype="float32")}
        readers["moebius"] = self._ours(file.path, dtype="bfloat16")
        readers["moebius, float32"] = self._ours(file.path, dtype="float32")
        with ExitStack() as stack:
            if self._given.llama is not None:
                program = self._given.llama / "llama-server"
                server = stack.enter_context(llama(program, file.path, self._given.threads, ROW))
                readers["llama.cpp"] = Theirs(server, file.path, self._vocab)
            found = compare(readers, self._readings, self._sizes)
        del found["model"]
        engines = {label: each.record() for label, each in found.items()}
        return {"format": file.format, "quantised_by": file.by, **engines}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="bundled", help="a directory, or bundled")
    parser.add_argument("--llama", type=Path, help="the folder of llama.cpp's programs")
    parser.add_argument("--max-tokens", type=int, default=6_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    model = resolve_model(given.model)
    judge = Judge(model, held_out(), given)
    record: dict[str, Any] = {"processor": processor(), "row_length": ROW, "plain": judge.plain()}
    first = record["plain"][0]["bits_per_byte"]
    for each in record["plain"]:
        print(_line(each, each["label"], first), flush=True)
    record["formats"] = []
    with tempfile.TemporaryDirectory() as folder:
        for file in files(model, Path(folder), given.llama):
            found = judge.of(file)
            record["formats"].append(found)
            for label in ("moebius", "moebius, float32", "llama.cpp"):
                if label in found:
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
