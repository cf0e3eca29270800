"""Output items of the Responses API, as they come: what a stream says of each, and what it is in
the end."""

import json
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import msgspec

from moebius.server.formats import encoded_list
from moebius.server.input_text import TextReader
from moebius.server.responses_input import sealed
from moebius.server.responses_tools import KnownTool
from moebius.text.replies import CallStart

Json = dict[str, Any]
Events = Iterator[tuple[str, Json]]
"""Types of events, without `response.`, and their own fields."""


class Item:
    """One item: its text comes in pieces. `shown` is what it is so far, and in the end."""

    shown: Json

    def opened(self) -> Events:
        """Behind the item's own beginning."""
        yield from ()

    def more(self, piece: str, scores: Sequence[msgspec.Raw]) -> Events:
        """scores: the log-probabilities of the tokens that begin in this piece of a text."""
        raise NotImplementedError

    def closed(self, *, cut: bool) -> Events:
        """cut: the reply's length ended it."""
        raise NotImplementedError


class TextItem(Item):
    """What the model says: an item with one part, which holds text."""

    events: ClassVar[str] = "output_text"

    def __init__(self, id: str) -> None:
        self.shown = {
            "id": f"msg_{id}",
            "type": "message",
            "role": "assistant",
            "status": "in_progress",
            "content": [],
        }
        self._pieces: list[str] = []
        self._scores: list[msgspec.Raw] = []

    def _part(self, text: str, beside: Json) -> Json:
        return {"type": "output_text", "text": text, "annotations": [], **beside}

    def _beside(self, scores: Sequence[msgspec.Raw]) -> Json:
        return {"logprobs": encoded_list(scores)}

    def opened(self) -> Events:
        part = self._part("", self._beside(()))
        yield "content_part.added", {"content_index": 0, "part": part}

    def more(self, piece: str, scores: Sequence[msgspec.Raw]) -> Events:
        self._pieces.append(piece)
        self._scores += scores
        yield f"{self.events}.delta", {"content_index": 0, "delta": piece, **self._beside(scores)}

    def closed(self, *, cut: bool) -> Events:
        text = "".join(self._pieces)
        beside = self._beside(self._scores)
        part = self._part(text, beside)
        status = "incomplete" if cut else "completed"
        self.shown = {**self.shown, "status": status, "content": [part]}
        yield f"{self.events}.done", {"content_index": 0, "text": text, **beside}
        yield "content_part.done", {"content_index": 0, "part": part}


class ReasoningItem(TextItem):
    """What the model thinks. seals: its text is given in a second form, for clients that send back
    only that."""

    events: ClassVar[str] = "reasoning_text"

    def __init__(self, id: str, *, seals: bool) -> None:
        super().__init__(id)
        self._seals = seals
        self.shown = {
            "id": f"rs_{id}",
            "type": "reasoning",
            "status": "in_progress",
            "summary": [],
            "content": [],
        }

    def _part(self, text: str, beside: Json) -> Json:
        return {"type": "reasoning_text", "text": text}

    def _beside(self, scores: Sequence[msgspec.Raw]) -> Json:
        return {}

    def closed(self, *, cut: bool) -> Events:
        yield from super().closed(cut=cut)
        if self._seals:
            self.shown["encrypted_content"] = sealed("".join(self._pieces))


class CallItem(Item):
    """A call of a function."""

    def __init__(self, id: str, call: CallStart, tool: KnownTool) -> None:
        self.shown = {
            "id": f"fc_{id}",
            "type": "function_call",
            "status": "in_progress",
            "call_id": call.id,
            "name": tool.name,
            "arguments": "",
            **_namespace(tool),
        }
        self._pieces: list[str] = []

    def more(self, piece: str, scores: Sequence[msgspec.Raw]) -> Events:
        self._pieces.append(piece)
        yield "function_call_arguments.delta", {"delta": piece}

    def closed(self, *, cut: bool) -> Events:
        arguments = "".join(self._pieces)
        status = "completed" if _is_json(arguments) else "incomplete"
        self.shown = {**self.shown, "status": status, "arguments": arguments}
        done = {"arguments": arguments, "name": self.shown["name"]}
        yield "function_call_arguments.done", done


class CustomCallItem(Item):
    """A call of a tool that takes a text; the model wrote it as a function's one argument."""

    def __init__(self, id: str, call: CallStart, tool: KnownTool) -> None:
        self.shown = {
            "id": f"ctc_{id}",
            "type": "custom_tool_call",
            "call_id": call.id,
            "name": tool.name,
            "input": "",
            **_namespace(tool),
        }
        self._reader = TextReader()
        self._pieces: list[str] = []

    def more(self, piece: str, scores: Sequence[msgspec.Raw]) -> Events:
        yield from self._told(self._reader.push(piece))

    def closed(self, *, cut: bool) -> Events:
        yield from self._told(self._reader.finish())
        text = "".join(self._pieces)
        self.shown = {**self.shown, "input": text}
        yield "custom_tool_call_input.done", {"input": text}

    def _told(self, text: str) -> Events:
        if text:
            self._pieces.append(text)
            yield "custom_tool_call_input.delta", {"delta": text}


def _namespace(tool: KnownTool) -> Json:
    return {} if tool.namespace is None else {"namespace": tool.namespace}


def _is_json(arguments: str) -> bool:
    try:
        json.loads(arguments)
    except ValueError:
        return False
    return True
