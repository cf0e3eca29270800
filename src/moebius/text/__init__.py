"""Text in and out: tokenizer, chat template, incremental decoding, stop strings. No tensors."""

from moebius.text.chat import ChatTemplate
from moebius.text.continuation import ends_anew, last_text
from moebius.text.defaults import GenerationDefaults
from moebius.text.gguf_tokenizer import tokenizer_from_gguf
from moebius.text.infill import infill_prompt
from moebius.text.model import ModelText, load_text, load_tokenizer
from moebius.text.prompts import EncodedPrompt
from moebius.text.replies import Expected, ReplyFormat, ReplyParser
from moebius.text.stream import IncrementalDecoder, StopMatcher, text_offsets
from moebius.text.tokenizer import Tokenizer

__all__ = [
    "ChatTemplate",
    "EncodedPrompt",
    "Expected",
    "GenerationDefaults",
    "IncrementalDecoder",
    "ModelText",
    "ReplyFormat",
    "ReplyParser",
    "StopMatcher",
    "Tokenizer",
    "ends_anew",
    "infill_prompt",
    "last_text",
    "load_text",
    "load_tokenizer",
    "text_offsets",
    "tokenizer_from_gguf",
]
