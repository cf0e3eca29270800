"""A model's tokenizer and defaults, wherever they are: in a directory, or in a GGUF file."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from moebius.files import read_json
from moebius.gguf import is_gguf, open_gguf
from moebius.text.defaults import GenerationDefaults
from moebius.text.gguf_tokenizer import gguf_templates, tokenizer_from_gguf
from moebius.text.gguf_values import PREFIX
from moebius.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

# Of so many tokens, spread over a vocabulary, as many have to be the same: a file may spell those
# that were added otherwise.
_SAMPLE = 500
_SAME = 0.9


class ModelText(NamedTuple):
    """What stands between text and a model."""

    tokenizer: Tokenizer
    defaults: GenerationDefaults


def load_text(path: Path, tokenizer: Path | None = None) -> ModelText:
    """Of the model at `path`, a directory or a GGUF file.

    tokenizer: where one is that is used instead of the model's; the log tells of one that cannot be
    its own. A GGUF file's model has the tokenizer.json beside it, where that is of the same
    vocabulary, and otherwise what is made of the file's keys. Raises TokenizerError, ConfigError
    for broken JSON, and WeightsError for a damaged GGUF file.
    """
    if not is_gguf(path):
        found = load_tokenizer(tokenizer or path)
        if tokenizer is not None:
            width = read_json(path / "config.json", default={}).get("vocab_size")
            if isinstance(width, int) and found.vocab_size > width:
                _warn_of_another(tokenizer, path)
        return ModelText(found, GenerationDefaults.load(path, found))
    metadata: Mapping[str, object] = open_gguf(path).metadata
    if tokenizer is not None:
        found = load_tokenizer(tokenizer, metadata)
        tokens = metadata.get(f"{PREFIX}tokens")
        if isinstance(tokens, list) and not _same_vocabulary(found, tokens):
            _warn_of_another(tokenizer, path)
    else:
        found = _beside(path, metadata) or tokenizer_from_gguf(metadata)
    return ModelText(found, GenerationDefaults.from_gguf(metadata, found))


def load_tokenizer(path: Path, metadata: Mapping[str, object] | None = None) -> Tokenizer:
    """The tokenizer in a directory or a GGUF file.

    metadata: of the GGUF file whose chat templates it gets, where a directory has none. Raises as
    load_text.
    """
    if is_gguf(path):
        return tokenizer_from_gguf(open_gguf(path).metadata)
    return Tokenizer.load(path, {} if metadata is None else gguf_templates(metadata))


def _beside(path: Path, metadata: Mapping[str, object]) -> Tokenizer | None:
    """The tokenizer beside a GGUF file; None where there is none, or it is another model's."""
    if not (path.parent / "tokenizer.json").is_file():
        return None
    found = load_tokenizer(path.parent, metadata)
    tokens = metadata.get(f"{PREFIX}tokens")
    if isinstance(tokens, list) and not _same_vocabulary(found, tokens):
        log.warning(
            "%s: the tokenizer.json beside it is another model's; the file's own tokenizer is used",
            path.name,
        )
        return None
    return found


def _warn_of_another(tokenizer: Path, model: Path) -> None:
    log.warning(
        "the tokenizer in %s has other tokens than %s was trained with; its answers may make no "
        "sense",
        tokenizer,
        model.name,
    )


def _same_vocabulary(tokenizer: Tokenizer, tokens: list[str]) -> bool:
    """Whether a tokenizer has most of these tokens, by their ids."""
    if not tokens or tokenizer.vocab_size > len(tokens):
        return False
    ids = range(0, len(tokens), max(1, len(tokens) // _SAMPLE))
    known = [token_id for token_id in ids if token_id < tokenizer.vocab_size]
    same = sum(tokenizer.spelling(token_id) == tokens[token_id] for token_id in known)
    return same >= _SAME * len(known)
