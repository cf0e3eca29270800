"""Training a byte-level BPE tokenizer, and the files that carry it in the Hugging Face layout."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from moebius.errors import ConfigError
from moebius.files import anyone, make_directory, write_file
from moebius.text.tokenizer import read_tokenizer_json

END_OF_TEXT = "<|endoftext|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, IM_START, IM_END)
# A tokenizer's files in the Hugging Face layout, those of transformers' slow tokenizers too.
_FILES = (
    "tokenizer*",
    "tokenization_*.py",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
)

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of exactly `vocab_size` entries; the special tokens have the ids 0, 1 and 2.

    Raises: ConfigError, when the texts are too short to yield as many merges.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    size = tokenizer.get_vocab_size()
    if size != vocab_size:
        raise ConfigError(
            f"the training text yields a vocabulary of {size} entries, fewer than "
            f"tokenizer.vocab_size = {vocab_size}"
        )
    return tokenizer


def special_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a special token. Raises: ConfigError, for a tokenizer that lacks it."""
    found: int | None = tokenizer.token_to_id(token)
    if found is None:
        raise ConfigError(
            f"the tokenizer lacks {token}, which separates documents; name its own end token in "
            "tokenizer.end_of_text"
        )
    return found


def read_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer.json, as what makes tokens of whole texts. Raises: TokenizerError."""
    tokenizer = read_tokenizer_json(path)
    # Some published files cut every text at so many tokens, or fill it up to so many.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def tokenizer_config(max_length: int) -> dict[str, Any]:
    """The content of tokenizer_config.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "additional_special_tokens": [IM_START, IM_END],
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "chat_template": CHAT_TEMPLATE,
    }


def save_tokenizer(
    tokenizer: Tokenizer, folder: Path, max_length: int, given: Path | None = None
) -> None:
    """Write tokenizer.json and tokenizer_config.json.

    Of a tokenizer.json that was `given`, copy it and the tokenizer's files beside it.
    """
    if given is not None:
        copy_files(given.parent, folder, _FILES)
        write_file(folder / "tokenizer.json", given.read_bytes(), ours=anyone)
        return
    tokenizer.encode_special_tokens = False
    write_file(folder / "tokenizer.json", tokenizer.to_str(pretty=True), ours=anyone)
    text = json.dumps(tokenizer_config(max_length), indent=2, ensure_ascii=False)
    write_file(folder / "tokenizer_config.json", text + "\n", ours=anyone)


def tokenizer_files(given: Path | None) -> list[Path]:
    """What `save_tokenizer` writes, relative to its folder."""
    copied = [] if given is None else matching(given.parent, _FILES)
    return sorted({Path("tokenizer.json"), Path("tokenizer_config.json"), *copied})


def matching(source: Path, patterns: Iterable[str]) -> list[Path]:
    """The files of a directory that the glob patterns name, relative to it."""
    found = (path for pattern in patterns for path in source.glob(pattern) if path.is_file())
    return sorted({path.relative_to(source) for path in found})


def copy_files(source: Path, target: Path, patterns: Iterable[str]) -> None:
    """Copy a directory's files that the glob patterns name to the same places below another."""
    for name in matching(source, patterns):
        copy = target / name
        make_directory(copy.parent)
        write_file(copy, (source / name).read_bytes(), ours=anyone)
