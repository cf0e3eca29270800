"""Our quantisers beside ggml's own, on the same numbers: error and speed.

    .venv/bin/python benchmarks/quantizers.py --ggml BUILD/bin/libggml-base.so

ggml's library is llama.cpp's: benchmarks/peers/README.md says how it is built. Errors are root mean
squares relative to the numbers', plain and weighted as the searches weight them (|x| plus the
block's size). Speed is of one thread, in processor time.
"""

import argparse
import ctypes
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from moebius.models.hub import resolve_model
from moebius.models.store.gguf import block_type
from moebius.ops import FORMATS
from moebius.quantize.encode import ENCODERS, block_format, encoded
from records import processor, save

ROWS = 1024
COLUMNS = 1024


class Ggml:
    """ggml's quantisers."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        whole = ctypes.c_int64
        address = ctypes.c_void_p
        function = self._library.ggml_quantize_chunk
        function.restype = ctypes.c_size_t
        function.argtypes = [ctypes.c_int, address, address, whole, whole, whole, address]

    def encoded(self, x_RK: Tensor, name: str) -> Tensor:
        """As moebius.quantize.encode.encoded."""
        number = block_type(name).number
        rows, columns = x_RK.shape
        ((_, shape),) = block_format(name).planes(rows, columns)
        out = torch.empty(shape, dtype=torch.uint8)
        self._library.ggml_quantize_init(number)
        self._library.ggml_quantize_chunk(
            number, x_RK.data_ptr(), out.data_ptr(), 0, rows, columns, None
        )
        return out


def numbers() -> dict[str, Tensor]:
    """Normal, heavy-tailed, and a real model's."""
    torch.manual_seed(0)
    normal = torch.randn(ROWS, COLUMNS) * 0.02
    heavy = torch.distributions.StudentT(4.0).sample((ROWS, COLUMNS)) * 0.02
    stored = load_file(resolve_model("bundled") / "model.safetensors")
    names = [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(6)]
    names += [
        f"model.layers.{layer}.mlp.experts.{e}.up_proj.weight" for layer in range(6) for e in (0, 1)
    ]
    real = torch.cat([stored[name].float() for name in names])
    return {"normal": normal, "student, 4 degrees": heavy, "bundled model": real.contiguous()}


def errors(x_RK: Tensor, found: Tensor, name: str) -> tuple[float, float]:
    wrong = FORMATS[name].widened((found,), torch.float32).view(-1, 32) - x_RK.view(-1, 32)
    x = x_RK.view(-1, 32)
    weight = x.abs() + x.square().mean(1, keepdim=True).sqrt()
    plain = wrong.norm() / x.norm()
    weighted = ((wrong.square() * weight).sum() / (x.square() * weight).sum()).sqrt()
    return float(plain), float(weighted)


def measured(encode: Callable[[Tensor, str], Tensor], x_RK: Tensor, name: str) -> dict[str, Any]:
    encode(x_RK[:16], name)
    start = time.thread_time()
    found = encode(x_RK, name)
    seconds = time.thread_time() - start
    plain, weighted = errors(x_RK, found, name)
    return {
        "error": round(plain, 6),
        "weighted_error": round(weighted, 6),
        "million_numbers_per_second": round(x_RK.numel() / seconds / 1e6, 1),
        "bytes": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ggml", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    ggml = Ggml(asked.ggml)
    rows = []
    for kind, x_RK in numbers().items():
        for name in ENCODERS:
            ours = measured(encoded, x_RK, name)
            theirs = measured(ggml.encoded, x_RK, name)
            same = torch.equal(ours.pop("bytes"), theirs.pop("bytes"))
            rows.append({"numbers": kind, "format": name, "same_bytes": same,
                         "moebius": ours, "ggml": theirs})  # fmt: skip
            ratio = ours["error"] / theirs["error"]
            weighted = ours["weighted_error"] / theirs["weighted_error"]
            print(
                f"{kind:20} {name:7} {'same bytes' if same else '':10} "
                f"error {ours['error']:.5f}, {ratio:.4f} x ggml's, weighted {weighted:.4f} x; "
                f"{ours['million_numbers_per_second']:.1f} M/s "
                f"(ggml {theirs['million_numbers_per_second']:.1f})"
            )
    save(asked.json, {"processor": processor(), "rows": rows})


if __name__ == "__main__":
    main()
