"""Log-probabilities in the formats that clients expect: two of OpenAI's, one of vLLM's for prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from moebius.engine.client import TokenLogprob
from moebius.text import Tokenizer

# JSON has no -inf; this is what OpenAI sends for it.
FLOOR = -9999.0


def legacy_token(tokenizer: Tokenizer, token_id: int) -> str:
    """A token's text; OpenAI's `bytes:\\xNN` form where its bytes alone are no characters, so that two such differ."""
    raw = tokenizer.token_bytes(token_id)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def completion_logprobs(
    tokenizer: Tokenizer, token_ids: Sequence[int], entries: Iterable[TokenLogprob | None], offsets: list[int], k: int
) -> dict[str, list[Any]]:
    """The format of /v1/completions: the k most likely tokens of each position, and the chosen one besides.

    A prompt's first token has none: its entry is None.
    """
    tokens = [legacy_token(tokenizer, token_id) for token_id in token_ids]
    chosen: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    for text, entry in zip(tokens, entries, strict=True):
        top: dict[str, float] = {}
        if entry is not None:
            for token_id, logprob in entry.top[:k]:
                top.setdefault(legacy_token(tokenizer, token_id), max(logprob, FLOOR))
            top.setdefault(text, max(entry.logprob, FLOOR))
        chosen.append(None if entry is None else max(entry.logprob, FLOOR))
        tops.append(None if entry is None else top)
    return {"tokens": tokens, "token_logprobs": chosen, "top_logprobs": tops, "text_offset": offsets}


def chat_logprobs(tokenizer: Tokenizer, entries: Iterable[TokenLogprob], k: int) -> dict[str, Any]:
    """The format of /v1/chat/completions."""

    def one(token_id: int, logprob: float) -> dict[str, Any]:
        raw = tokenizer.token_bytes(token_id)
        return {"token": raw.decode("utf-8", "replace"), "logprob": max(logprob, FLOOR), "bytes": list(raw)}

    content = [
        {**one(entry.token_id, entry.logprob), "top_logprobs": [one(*pair) for pair in entry.top[:k]]}
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def prompt_logprobs(
    tokenizer: Tokenizer, entries: Iterable[TokenLogprob], k: int
) -> list[dict[str, dict[str, Any]] | None]:
    """vLLM's format: null for the first token, then token id -> logprob, rank and text, the prompt's own included."""
    found: list[dict[str, dict[str, Any]] | None] = [None]
    for entry in entries:
        ranked = [(token_id, logprob, rank) for rank, (token_id, logprob) in enumerate(entry.top[:k], 1)]
        if all(token_id != entry.token_id for token_id, _, _ in ranked):
            ranked.insert(0, (entry.token_id, entry.logprob, entry.rank))
        found.append(
            {
                str(id): {"logprob": max(logprob, FLOOR), "rank": rank, "decoded_token": tokenizer.token_text(id)}
                for id, logprob, rank in ranked
            }
        )
    return found
