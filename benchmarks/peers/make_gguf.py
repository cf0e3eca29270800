"""Write a GGUF file of a published model's sizes whose numbers are random: for models too large to
be quantised here.

    .venv/bin/python benchmarks/peers/make_gguf.py --model qwen3-30b                 # 18.6 GB
    .venv/bin/python benchmarks/peers/make_gguf.py --model gpt-oss-20b --type mxfp4

Types are those that `moebius quantize` gives the tensors. Numbers have a mean of about 0 and a
deviation of about 0.02, as a trained model's. The benchmark hands over token ids, so that most of
the vocabulary are fillers.

With --narrow all is small that a KV cache does not depend on: what engines take for one can then be
read off their logs within a second.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from common import peers_folder
from published import PUBLISHED, Published

from moebius.files import anyone
from moebius.gguf import Value
from moebius.gguf.writer import TensorToWrite, write_gguf
from moebius.models.gguf_keys import gguf_keys
from moebius.models.store.gguf import block_type
from moebius.ops.formats import FORMATS, BlockFormat
from moebius.quantize.encode import encoded
from moebius.quantize.recipe import RECIPES, Recipe, format_of

DEVIATION = 0.02
# Numbers repeat after so many: nobody compresses them, and new ones would take minutes.
POOL = 2**22
PIECE = 2**24
# Answers stand in the next prompt without their thinking, which the prompt begins.
TEMPLATE = """\
{%- for message in messages -%}
<|{{ message.role }}|>
{{ message.content.split('</think>')[-1] }}
{% endfor -%}
{%- if add_generation_prompt -%}
<|assistant|>
<think>
{% endif -%}"""


# What keys and values do not depend on, as few as the formats' blocks allow.
NARROW = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "num_experts": 2,
    "num_local_experts": 2,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "vocab_size": 1024,
}


class Pools:
    """Random numbers in each format, drawn and encoded once."""

    def __init__(self, seed: int) -> None:
        self._drawn = torch.Generator().manual_seed(seed)
        self._blocks: dict[str, bytes] = {}

    def blocks(self, format: BlockFormat, nbytes: int) -> Iterator[memoryview]:
        """So many bytes of whole blocks, from a random one on."""
        pool = self._blocks.get(format.name)
        if pool is None:
            numbers_NE = DEVIATION * self.normal(POOL // format.elements, format.elements)
            pool = encoded(numbers_NE, format.name).numpy().tobytes()
            pool *= 1 + PIECE // len(pool)
            self._blocks[format.name] = pool
        first = int(torch.randint(POOL // format.elements, (1,), generator=self._drawn))
        start = first * format.nbytes
        while nbytes:
            piece = memoryview(pool)[start : start + nbytes]
            yield piece
            nbytes -= len(piece)
            start = 0

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._drawn)


def vector(name: str, shape: tuple[int, ...], pools: Pools) -> torch.Tensor:
    """What is not quantised, as its name says: weights of norms are 1, decays below 0."""
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    if name.endswith("ssm_a"):
        return -pools.normal(*shape).exp()
    return (0.3 if "conv1d" in name else DEVIATION) * pools.normal(*shape)


@dataclass(frozen=True, slots=True)
class Planned:
    """A tensor of the file; `format` None: float32."""

    name: str
    shape: tuple[int, ...]
    format: BlockFormat | None

    def to_write(self, pools: Pools) -> TensorToWrite:
        def pieces() -> Iterator[bytes | memoryview]:
            if self.format is None:
                yield vector(self.name, self.shape, pools).numpy().tobytes()
            else:
                yield from pools.blocks(self.format, tensor.nbytes)

        kind = block_type("float32" if self.format is None else self.format.name)
        tensor = TensorToWrite(self.name, kind, self.shape, pieces)
        return tensor


def planned(model: Published, recipe: Recipe) -> list[Planned]:
    """All tensors, in the file's order."""
    found: dict[str, Planned] = {}
    for source in model.tensors:
        if source.name in found:
            continue
        last = len(source.stored_shape) - 1
        shape = [n for i, n in enumerate(source.stored_shape) if n != 1 or i in (0, last)]
        format = FORMATS.get(str(format_of(recipe, source, model.model)))
        blocks = format if isinstance(format, BlockFormat) else None
        found[source.name] = Planned(source.name, tuple(shape), blocks)
    return list(found.values())


def byte_letters() -> list[str]:
    """The letter that stands for each byte in a byte-level vocabulary (GPT-2): itself where it is
    printed, and one from 256 on where it is not."""
    printed = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printed else next(others)) for byte in range(256)]


def vocabulary(size: int) -> dict[str, Value]:
    """The 256 bytes, one pair of them, and fillers."""
    letters = byte_letters()
    tokens = [*letters, letters[32] + "a"]
    tokens += [f"<filler {number}>" for number in range(len(tokens), size)]
    normal = 1
    unused = 5
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [normal] * 257 + [unused] * (size - 257),
        "tokenizer.ggml.merges": [f"{letters[32]} a"],
        "tokenizer.ggml.eos_token_id": size - 1,
        "tokenizer.chat_template": TEMPLATE,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, choices=PUBLISHED)
    parser.add_argument("--type", default="q4_k_m", choices=RECIPES)
    parser.add_argument("--out", type=Path, help="default: PEERS/models/MODEL-TYPE.gguf")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--narrow", action="store_true", help="what no cache depends on is small")
    given = parser.parse_args()
    model = PUBLISHED[given.model]
    if given.narrow:
        ours = model.config_json
        model = Published({**ours, **{key: NARROW[key] for key in NARROW if key in ours}})
    recipe = RECIPES[given.type]
    out = given.out or peers_folder() / "models" / f"{given.model}-{given.type}.gguf"
    metadata = {
        **gguf_keys(model.config_json).keys,
        **vocabulary(model.vocab),
        "general.file_type": recipe.file_type,
        "general.quantization_version": 2,
    }
    pools = Pools(given.seed)
    tensors = [each.to_write(pools) for each in planned(model, recipe)]
    layout = write_gguf(out, metadata, tensors, ours=anyone)
    print(f"{out}: {layout.size / 1e9:.1f} GB")


if __name__ == "__main__":
    main()
