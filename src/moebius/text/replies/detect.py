"""Which format a model writes tool calls in, by its vocabulary and its chat template."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from moebius.text.replies import harmony
from moebius.text.replies.deepseek import DeepSeek, DeepSeekV31
from moebius.text.replies.gemma4 import Gemma4
from moebius.text.replies.glm import Glm
from moebius.text.replies.hermes import Hermes
from moebius.text.replies.invoke import Dsml, DsmlV4, Invoke
from moebius.text.replies.kimi import Kimi
from moebius.text.replies.llama3 import Llama3
from moebius.text.replies.mistral import Mistral
from moebius.text.replies.pythonic import Lfm2, Olmo3, Pythonic
from moebius.text.replies.qwen_xml import QwenXml, SeedXml
from moebius.text.replies.tools import ToolFormat


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What is known of a model's texts.

    tokens     the ids of its added tokens, by their texts
    templates  its chat templates by name
    text_of    the text of a token
    encode     the ids of a text, in which the texts of added tokens are these
    """

    tokens: Mapping[str, int]
    templates: Mapping[str, str]
    text_of: Callable[[int], str]
    encode: Callable[[str], list[int]]

    @property
    def template(self) -> str:
        """All that its templates say: one that is for tools may stand beside the plain one."""
        return "\n".join(self.templates.values())


@dataclass(frozen=True, slots=True)
class _Sign:
    """What tells a format: all of these texts.

    written   in the template
    tokens    in the vocabulary
    known     in either
    """

    name: str
    written: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()
    known: tuple[str, ...] = ()

    def fits(self, vocabulary: Vocabulary, template: str) -> bool:
        return (
            all(text in template for text in self.written)
            and all(token in vocabulary.tokens for token in self.tokens)
            and all(text in vocabulary.tokens or text in template for text in self.known)
        )


# The first that fits counts: some signs are signs of others, too.
_SIGNS = (
    _Sign(SeedXml.name, ("<function=", "<parameter=", "<seed:")),
    _Sign(QwenXml.name, ("<function=", "<parameter=")),
    _Sign(Invoke.name, ("<minimax:tool_call>",)),
    _Sign(Dsml.name, ("｜DSML｜", "function_calls")),
    _Sign(DsmlV4.name, ("｜DSML｜", "tool_calls")),
    _Sign(Kimi.name, known=("<|tool_calls_section_begin|>",)),
    _Sign(DeepSeek.name, ("```json",), known=("<｜tool▁calls▁begin｜>", "<｜tool▁sep｜>")),
    _Sign(DeepSeekV31.name, known=("<｜tool▁calls▁begin｜>", "<｜tool▁sep｜>")),
    _Sign(Glm.name, known=("<arg_key>", "<arg_value>")),
    _Sign(Gemma4.name, tokens=("<|tool_call>",)),
    _Sign(Lfm2.name, known=("<|tool_call_start|>",)),
    _Sign(Mistral.name, known=("[TOOL_CALLS]",)),
    _Sign(Olmo3.name, ("<function_calls>",)),
    _Sign(Hermes.name, ("<tool_call>",)),
    _Sign(Pythonic.name, ("tools",), ("<|python_start|>",)),
    _Sign(Llama3.name, ("tools",), ("<|python_tag|>",)),
    _Sign(Llama3.name, ("tools", "parameters", "ipython")),
)
KINDS: Mapping[str, type[ToolFormat]] = {
    kind.name: kind
    for kind in (
        Hermes,
        QwenXml,
        SeedXml,
        Glm,
        DeepSeek,
        DeepSeekV31,
        Invoke,
        Dsml,
        DsmlV4,
        Kimi,
        Mistral,
        Llama3,
        Pythonic,
        Lfm2,
        Olmo3,
        Gemma4,
    )
}
"""The formats of replies with markers, by what --tool-format calls them."""


def detect(vocabulary: Vocabulary) -> str:
    """The name of the format in which a model writes tool calls; "none" for none that is known."""
    template = vocabulary.template
    if harmony.fits(vocabulary.tokens, template):
        return harmony.NAME
    found = (sign.name for sign in _SIGNS if sign.fits(vocabulary, template))
    return next(found, "none")
