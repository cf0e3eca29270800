"""What a reply to a chat is made of: reasoning, content and tool calls, read as it comes."""

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
from moebius.text.replies.formats import FORMATS, ReplyFormat, Vocabulary
from moebius.text.replies.parser import Asked, ReplyParser

__all__ = [
    "FORMATS",
    "Asked",
    "CallArguments",
    "CallEnd",
    "CallStart",
    "Content",
    "Event",
    "Reasoning",
    "ReplyFormat",
    "ReplyParser",
    "Said",
    "SaidCall",
    "Vocabulary",
    "fold",
    "merged",
]
