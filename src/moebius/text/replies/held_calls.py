"""The grammar of a reply whose tool calls are held to their schemas, in the model's own format."""

from collections.abc import Sequence

from moebius.text.replies.lark import ANY, HeldTool, Lark
from moebius.text.replies.tools import ToolFormat

_BETWEEN = r"/\n{1,2}/?"


def held_calls(
    lark: Lark, kind: ToolFormat, tools: Sequence[HeldTool], *, must: bool, several: bool
) -> None:
    """Write it: a reply that calls at once (`must`), or free text, and each call that begins in it.

    RequestError for what cannot be held.
    """
    if must:
        lark.start(_calling(lark, kind, tools, several=several))
    elif kind.bare:
        lark.start(_calling_or_not(lark, kind, tools, several=several))
    else:
        lark.start(_speaking(lark, kind, tools, several=several))


def _calling(lark: Lark, kind: ToolFormat, tools: Sequence[HeldTool], *, several: bool) -> str:
    starter = kind.starters[0]
    call = lark.rule(f"{lark.text(starter)} {kind.held(lark, starter, tools, several=several)}")
    if kind.bare:
        return f"{kind.held(lark, '', tools, several=several)} | {call}"
    return f"{call} ({_BETWEEN} {call})*" if several and kind.repeats else call


def _calling_or_not(
    lark: Lark, kind: ToolFormat, tools: Sequence[HeldTool], *, several: bool
) -> str:
    """Where a call may have no marker: a reply that begins as one is one."""
    space = r"[\s\x1c-\x1f]"
    free = rf"/{space}*[^\s\x1c-\x1f\{kind.bare}](?s:.*)/"
    starter = kind.starters[0]
    marked = f"{lark.behind(starter, free)} {kind.held(lark, starter, tools, several=several)}"
    return (
        f"{kind.held(lark, '', tools, several=several)} | {marked} "
        f"| {lark.terminal(free)} | /{space}*/"
    )


def _speaking(lark: Lark, kind: ToolFormat, tools: Sequence[HeldTool], *, several: bool) -> str:
    calls = [
        lark.rule(f"{lark.behind(each)} {kind.held(lark, each, tools, several=several)}")
        for each in kind.starters
    ]
    free = lark.terminal(ANY)
    some = " | ".join(calls)
    return f"({some})* {free}?" if several else f"{some} | {free}?"
