"""A chat whose last message stays open, so that the answer goes on with it (a prefill).

Templates close every message, and many trim its text. So a sentinel is put behind the text, the
chat is rendered, and what was rendered is cut off where the sentinel begins: all before it is as
the client wrote it, white space at its end included.
"""

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from moebius.errors import RequestError

Messages = Sequence[Mapping[str, Any]]


def ends_anew(add_generation_prompt: bool | None, continue_final_message: bool) -> bool:
    """Whether a chat ends with a generation prompt: unless it is said, where its last message is
    not to be continued."""
    if add_generation_prompt is None:
        return not continue_final_message
    return add_generation_prompt


def last_text(messages: Messages) -> str:
    """The text of the last message, which the answer goes on with.

    RequestError where that is not the assistant's, has no text, or calls tools behind it.
    """
    last = messages[-1] if messages else {}
    parts = last.get("content") if isinstance(last, Mapping) else None
    if not isinstance(last, Mapping) or last.get("role") != "assistant":
        raise RequestError(
            "continue_final_message goes on with the last message, which must be the assistant's",
            param="continue_final_message",
        )
    if last.get("tool_calls"):
        raise RequestError(
            "continue_final_message goes on with the text of the last message, which calls tools "
            "behind it",
            param="continue_final_message",
        )
    texts = [parts] if isinstance(parts, str) else parts
    if isinstance(texts, Sequence) and texts:
        # What else may stand in a list of parts is refused by name when the chat is rendered.
        found = [part.get("text") if isinstance(part, Mapping) else part for part in texts]
        return "\n".join(text for text in found if isinstance(text, str))
    raise RequestError(
        "continue_final_message goes on with the text of the last message, which has none",
        param="continue_final_message",
    )


class Opened:
    """Where the rendering of one chat is to be cut."""

    def __init__(self) -> None:
        # ASCII without letters: nothing that templates do to text changes it.
        self._sentinel = f"/{secrets.randbelow(10**18):018}/"

    def marked(self, messages: Messages) -> list[Mapping[str, Any]]:
        """The normalised messages with the sentinel behind the last one's text."""
        *history, last = messages
        content = last["content"]
        if isinstance(content, str):
            return [*history, {**last, "content": content + self._sentinel}]
        *parts, end = content
        opened = {**end, "text": end["text"] + self._sentinel}
        return [*history, {**last, "content": [*parts, opened]}]

    def cut(self, rendered: str) -> str:
        """What was rendered before the sentinel; RequestError where the template left it out."""
        text, found, _ = rendered.rpartition(self._sentinel)
        if not found:
            raise RequestError(
                "continue_final_message: the chat template does not show the last message's text, "
                "so that nothing can go on with it",
                param="continue_final_message",
            )
        return text


def opened_chat(messages: Messages, wanted: bool, added: bool) -> Opened | None:
    """How a chat is left open, if it is; RequestError where it cannot be."""
    if not wanted:
        return None
    if added:
        raise RequestError(
            "continue_final_message and add_generation_prompt cannot both be true: an answer goes "
            "on with the last message, or is a new one",
            param="continue_final_message",
        )
    last_text(messages)
    return Opened()
