"""Encoded prompts, and where in a chat's prompt the part begins that its template adds."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moebius.errors import RequestError
from moebius.text.chat import ChatTemplate


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """The ids of a prompt.

    generation_start: how many of them come before the generation prompt that a chat template adds;
    None where that is not known, as of a text without a template. inside: a chat's last message has
    not ended, and the answer's text goes on with it. end_ids: those that end the answer, besides
    the model's own.
    """

    ids: Sequence[int]
    generation_start: int | None = None
    inside: bool = False
    end_ids: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """A chat that a template has rendered.

    marker   what keeps special tokens' text plain in it
    kind     template and role of the last message; None where the client sets variables too
    """

    template: ChatTemplate
    variables: Mapping[str, Any]
    marker: str | None
    rendered: str
    kind: tuple[str, str] | None


@dataclass(frozen=True, slots=True)
class _GenerationPrompt:
    text: str
    ids: list[int]

    def start(self, ids: list[int]) -> int | None:
        """Where in the ids of a prompt that ends with it its own begin; None where none do."""
        start = len(ids) - len(self.ids)
        return start if ids[start:] == self.ids else None


class GenerationPrompts:
    """What the templates of a model add when asked for a generation prompt.

    A template adds the same to most chats. What it added to one whose last message had the same
    role is looked for first, because rendering a chat twice takes long.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], _GenerationPrompt] = {}

    def start(
        self, chat: RenderedChat, ids: list[int], encode: Callable[[str], list[int]]
    ) -> int | None:
        """How many of the chat's ids come before its generation prompt.

        None where the template changes more than the end, or the end has no tokens of its own.
        encode: ids of a part of the rendered text.
        """
        known = None if chat.kind is None else self._known.get(chat.kind)
        if known is not None and chat.rendered.endswith(known.text):
            return known.start(ids)
        try:
            history = chat.template.render({**chat.variables, "add_generation_prompt": False})
        except RequestError:
            return None
        if not chat.rendered.startswith(history):
            return None
        text = chat.rendered[len(history) :]
        added = _GenerationPrompt(text, encode(text))
        start = added.start(ids)
        if chat.kind is not None and text and start is not None:
            self._known[chat.kind] = added
        return start
