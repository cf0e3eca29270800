"""What tokenizer_config.json and its like say of tokens: names of special ones, and added ones that
tokenizer.json may not have."""

from collections.abc import Mapping
from itertools import chain
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from moebius.errors import TokenizerError


def special_tokens(config: Mapping[str, Any]) -> dict[str, Any]:
    """Special tokens by name; `additional_special_tokens` are those without one.

    Entries may be strings or AddedToken records. As in transformers any key that ends in `_token`
    is such a name, and so are those under `model_specific_special_tokens`, and under
    `extra_special_tokens` where that is an object. A list there is what older versions call
    additional_special_tokens.
    """

    def text(entry: object) -> str | None:
        found = entry.get("content") if isinstance(entry, Mapping) else entry
        return found if isinstance(found, str) else None

    extra = config.get("extra_special_tokens")
    named = {name: entry for name, entry in config.items() if name.endswith("_token")}
    for more_names in (config.get("model_specific_special_tokens"), extra):
        named |= more_names if isinstance(more_names, Mapping) else {}
    texts = {name: text(entry) for name, entry in named.items()}
    specials: dict[str, Any] = {name: found for name, found in texts.items() if found is not None}
    lists = [
        entries
        for entries in (config.get("additional_special_tokens"), extra)
        if isinstance(entries, list)
    ]
    if lists:
        unnamed = dict.fromkeys(text(entry) for entry in chain(*lists))
        specials["additional_special_tokens"] = [each for each in unnamed if each is not None]
    return specials


def _added_records(config: Mapping[str, Any]) -> list[tuple[int, Mapping[str, Any]]]:
    """The records of added_tokens_decoder by id, each with a `content`.

    Raises TokenizerError naming what is none.
    """
    records = config.get("added_tokens_decoder")
    if not isinstance(records, Mapping):
        return []
    found = []
    for key, record in records.items():
        content = record.get("content") if isinstance(record, Mapping) else None
        if not key.isdecimal() or not isinstance(content, str):
            raise TokenizerError(
                f"tokenizer_config.json: added_tokens_decoder holds {key!r}: {record!r}; "
                'it must map token ids to records such as {"content": "<s>", "special": true}'
            )
        found.append((int(key), record))
    return sorted(found, key=lambda entry: entry[0])


def _add_token(backend: Backend, token: AddedToken, token_id: int) -> None:
    """Add a token that is to have this id. Raises TokenizerError where it gets another."""
    if token.special:
        backend.add_special_tokens([token])
    else:
        backend.add_tokens([token])
    given = backend.token_to_id(token.content)
    if given != token_id:
        raise TokenizerError(
            f"tokenizer_config.json gives {token.content!r} the id {token_id}, tokenizer.json "
            f"{given}"
        )


_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def _added_token(record: Mapping[str, Any], known: AddedToken | None) -> AddedToken:
    """A record of added_tokens_decoder, where `known` is tokenizer.json's token of that id.

    Flags that the record leaves out are the known token's, which stays special if it is.
    """
    flags = {name: bool(record[name]) for name in _FLAGS if name in record}
    if known is not None:
        flags = {name: getattr(known, name) for name in _FLAGS} | flags
        flags["special"] |= known.special
    return AddedToken(record["content"], **flags)


def add_tokens(backend: Backend, config: Mapping[str, Any], specials: Mapping[str, Any]) -> None:
    """Give a backend what only tokenizer_config.json knows of added tokens.

    Tokens, flags, and the mark `special` where it is due. A name without a token is left alone: an
    id beyond the model's embeddings helps nobody.
    """
    known = backend.get_added_tokens_decoder()
    for token_id, record in _added_records(config):
        same = known.get(token_id)
        if same is not None and same.content != record["content"]:
            continue
        token = _added_token(record, same)
        if same != token:
            _add_token(backend, token, token_id)
    # As in transformers, one without a name stays visible where the file has it as an added token
    # that is visible.
    added = {token.content: token.special for token in backend.get_added_tokens_decoder().values()}
    plain = {text for text, special in added.items() if not special}
    named = [text for text in specials.values() if isinstance(text, str)]
    unnamed = [text for text in specials.get("additional_special_tokens", []) if text not in plain]
    for text in [*named, *unnamed]:
        if not added.get(text) and backend.token_to_id(text) is not None:
            backend.add_special_tokens([text])
