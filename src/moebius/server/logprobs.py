"""Log-probabilities in the formats that clients expect: two of OpenAI's, one of vLLM's for prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from moebius.engine.client import TokenLogprob
from moebius.server.responses import ChatLogprob, ChatLogprobs, CompletionLogprobs, PromptLogprobs, TopLogprob
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
    tokenizer: Tokenizer,
    token_ids: Sequence[int],
    entries: Iterable[TokenLogprob | None],
    offsets: Iterable[int],
    k: int,
) -> CompletionLogprobs:
    """The format of /v1/completions: the k most likely tokens of each position, and the chosen one besides."""
    found = CompletionLogprobs([legacy_token(tokenizer, token_id) for token_id in token_ids], [], [], list(offsets))
    for text, entry in zip(found.tokens, entries, strict=True):
        if entry is None:
            found.token_logprobs.append(None)
            found.top_logprobs.append(None)
            continue
        top: dict[str, float] = {}
        for token_id, logprob in entry.top[:k]:
            top.setdefault(legacy_token(tokenizer, token_id), max(logprob, FLOOR))
        chosen = max(entry.logprob, FLOOR)
        top.setdefault(text, chosen)
        found.token_logprobs.append(chosen)
        found.top_logprobs.append(top)
    return found


def chat_logprobs(tokenizer: Tokenizer, entries: Iterable[TokenLogprob], k: int) -> ChatLogprobs:
    """The format of /v1/chat/completions."""

    def top(token_id: int, logprob: float) -> TopLogprob:
        raw = tokenizer.token_bytes(token_id)
        return TopLogprob(raw.decode("utf-8", "replace"), max(logprob, FLOOR), list(raw))

    content = []
    for entry in entries:
        own = top(entry.token_id, entry.logprob)
        content.append(ChatLogprob(own.token, own.logprob, own.bytes, [top(*pair) for pair in entry.top[:k]]))
    return ChatLogprobs(content)


def prompt_logprobs(tokenizer: Tokenizer, entries: Iterable[TokenLogprob], k: int) -> PromptLogprobs:
    """vLLM's format: null for the first token, then token id -> logprob, rank and text, the prompt's own included."""
    found: PromptLogprobs = [None]
    for entry in entries:
        ranked = [(token_id, logprob, rank) for rank, (token_id, logprob) in enumerate(entry.top[:k], 1)]
        if all(token_id != entry.token_id for token_id, _, _ in ranked):
            ranked.insert(0, (entry.token_id, entry.logprob, entry.rank))
        found.append(
            {
                str(token_id): {
                    "logprob": max(logprob, FLOOR),
                    "rank": rank,
                    "decoded_token": tokenizer.token_text(token_id),
                }
                for token_id, logprob, rank in ranked
            }
        )
    return found
