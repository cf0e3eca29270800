"""A tokenizer with gpt-oss' special tokens, and a chat template that writes its format."""

from __future__ import annotations

from tokenizers import Tokenizer as Backend

from moebius.text import ChatTemplate, Tokenizer
from text.tiny_tokenizers import byte_level

SPECIALS = [
    "<|startoftext|>",
    "<|endoftext|>",
    "<|return|>",
    "<|constrain|>",
    "<|channel|>",
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|call|>",
]
# An assistant's earlier reply is its final message alone; reasoning that a client hands back stays
# out of it.
TEMPLATE = (
    "{{ '<|start|>system<|message|>Reasoning: ' + (reasoning_effort or 'medium') + '<|end|>' }}"
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}"
    "{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)


def backend() -> Backend:
    made = byte_level()
    made.add_special_tokens(SPECIALS)
    # One token each, as in o200k_harmony.
    made.add_tokens(["analysis", "commentary", "final", "assistant"])
    return made


def harmony_tokenizer(template: str = TEMPLATE) -> Tokenizer:
    names = {"bos_token": "<|startoftext|>", "eos_token": "<|return|>"}
    return Tokenizer(backend(), names, templates={"default": ChatTemplate(template)})
