"""The events that a reply is made of, and what they come to."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A piece of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class Content:
    """A piece of the answer.

    tokens   which of the reply's tokens it is made of, counted from 0, where whoever has read them
             tells: each of them with the first of its characters that is content
    """

    text: str
    tokens: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class CallStart:
    """A tool call begins. `index` counts a reply's calls from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A piece of a call's arguments: together they are the JSON text of an object, unless the model
    wrote none or was cut off."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """No more of a call comes."""

    index: int


Event = Reasoning | Content | CallStart | CallArguments | CallEnd


@dataclass(frozen=True, slots=True)
class SaidCall:
    """A whole tool call; arguments are JSON text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Said:
    """A whole reply; None is what there is nothing of."""

    reasoning: str | None = None
    content: str | None = None
    calls: tuple[SaidCall, ...] = ()


def fold(events: Iterable[Event]) -> Said:
    """What a reply's events come to."""
    reasoning: list[str] = []
    content: list[str] = []
    starts: list[CallStart] = []
    arguments: dict[int, list[str]] = {}
    for event in events:
        match event:
            case Reasoning(text):
                reasoning.append(text)
            case Content(text):
                content.append(text)
            case CallStart(index):
                starts.append(event)
                arguments[index] = []
            case CallArguments(index, text):
                arguments[index].append(text)
            case CallEnd():
                pass
    return Said(
        reasoning="".join(reasoning) or None,
        content="".join(content) or None,
        calls=tuple(
            SaidCall(start.id, start.name, "".join(arguments[start.index])) for start in starts
        ),
    )


def merged(events: Iterable[Event]) -> list[Event]:
    """Pieces of one thing that came together as one piece."""
    found: list[Event] = []
    for event in events:
        last = found[-1] if found else None
        match last, event:
            case (Reasoning(before), Reasoning(text)):
                found[-1] = Reasoning(before + text)
            case (Content(before, tokens), Content(text, more)):
                found[-1] = Content(before + text, tokens + more)
            case (CallArguments(index, before), CallArguments(same, text)) if index == same:
                found[-1] = CallArguments(index, before + text)
            case _:
                found.append(event)
    return found
