"""What a reply to a chat is made of: reasoning, content and tool calls, read as it comes."""

from moebius.text.replies.detect import Vocabulary
from moebius.text.replies.events import (
    CallArguments,
    CallEnd,
    CallStart,
    Content,
    Event,
    Reasoning,
    Said,
    SaidCall,
    fold,
    merged,
)
from moebius.text.replies.formats import EFFORTS, FORMATS, ReplyFormat
from moebius.text.replies.lark import HeldTool
from moebius.text.replies.parser import Expected, ReplyParser
from moebius.text.replies.thinking import ReasoningEnds

__all__ = [
    "EFFORTS",
    "FORMATS",
    "CallArguments",
    "CallEnd",
    "CallStart",
    "Content",
    "Event",
    "Expected",
    "HeldTool",
    "Reasoning",
    "ReasoningEnds",
    "ReplyFormat",
    "ReplyParser",
    "Said",
    "SaidCall",
    "Vocabulary",
    "fold",
    "merged",
]
