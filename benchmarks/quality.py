"""The bundled model in every format: bits per byte of its held-out text, beside llama.cpp.

    .venv/bin/python benchmarks/quality.py [--llama BUILD/bin/llama-perplexity]

The text is what recipes/stdlib holds out of Python's standard library. Each format is computed as
it is served. With --llama, the same formats are written as GGUF files, and llama.cpp's own tool
tells their divergence from the same model in float32, on the beginning of the same text.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from moebius.bench.quality import Candidate, measure
from moebius.engine.config import EngineConfig
from moebius.inspect.corpus import Document
from moebius.models.hub import resolve_model
from moebius.quantize.export import write_model
from moebius.quantize.recipe import RECIPES
from records import processor, save

ROW = 512
KINDS = ("library", "docs")
_ATTEMPTS = 6


def held_out() -> list[Document]:
    """What was not trained on, in the order of its paths."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "recipes" / "stdlib"))
    from prepare import read_library

    every = (each for each in read_library() if each.split != "train" and each.kind in KINDS)
    return [Document(each.path, each.kind, each.text) for each in every]


def ours(documents: list[Document], max_tokens: int) -> list[dict[str, Any]]:
    model = resolve_model("bundled")
    plain = EngineConfig(dtype="float32", kv_cache_memory_bytes=2**25)
    candidates = [
        Candidate("float32", model, plain),
        Candidate("bfloat16", model, replace(plain, dtype="bfloat16")),
    ]
    for name in RECIPES:
        candidates.append(Candidate(name, model, replace(plain, dtype="auto", quantization=name)))
    found = measure(candidates, documents, row_length=ROW, max_tokens=max_tokens)
    return [figures.record() for figures in found]


def theirs(tool: Path, documents: list[Document], max_tokens: int) -> Iterator[dict[str, Any]]:
    """llama.cpp's divergence of each format from the float32 file."""
    model = resolve_model("bundled")
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text("".join(each.text for each in documents))
        base = Path(folder) / "base"
        common = ["-t", "2", "-c", str(ROW), "--chunks", str(max_tokens // ROW), "-f", str(text)]
        common += ["--kl-divergence-base", str(base)]
        for name in ("f32", *RECIPES):
            file = Path(folder) / f"{name}.gguf"
            write_model(model, file, name)
            command = [str(tool), "-m", str(file), *common]
            if name != "f32":
                command.append("--kl-divergence")
            divergence, same = _figures(command, wanted=name != "f32")
            if name != "f32":
                yield {"label": name, "mean_divergence": divergence, "same_choice": same / 100}


def _figures(command: list[str], *, wanted: bool) -> tuple[float, float]:
    """Mean divergence and percent of same choices; the tool may end before it has said them."""
    for _ in range(_ATTEMPTS):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        said = done.stdout + done.stderr
        divergence = re.search(r"Mean\s+KLD:\s+(\S+)", said)
        same = re.search(r"Same top p:\s+(\S+)", said)
        if not wanted:
            return 0.0, 100.0
        if divergence and same:
            return float(divergence[1]), float(same[1])
    raise SystemExit(f"{command[0]} says nothing: {said[-500:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--llama", type=Path, help="llama.cpp's llama-perplexity")
    parser.add_argument("--max-tokens", type=int, default=20_000)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    documents = held_out()
    record: dict[str, Any] = {"processor": processor(), "row_length": ROW}
    record["moebius"] = ours(documents, asked.max_tokens)
    first = record["moebius"][0]["bits_per_byte"]
    for each in record["moebius"]:
        bits = each["bits_per_byte"]
        print(
            f"{each['label']:10} {each['weight_bytes']:>12,} bytes  {bits:.4f} bits per byte "
            f"({100 * (bits / first - 1):+.2f} %)  divergence {each['mean_divergence']:.5f}  "
            f"same choice {100 * each['same_choice']:.1f} %"
        )
    if asked.llama is not None:
        record["llama.cpp"] = list(theirs(asked.llama, documents, asked.max_tokens))
        for each in record["llama.cpp"]:
            print(f"llama.cpp, {each['label']}: divergence {each['mean_divergence']:.5f}")
    save(asked.json, record)


if __name__ == "__main__":
    main()
