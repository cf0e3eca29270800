"""How a byte-level BPE cuts text into words, by the name that a GGUF file has for it.

A file holds the name alone (tokenizer.ggml.pre). What stands here is the pre-tokenizer of the
tokenizer.json that was published with the models of that name, which llama.cpp's own expressions
imitate; whether the text is composed first (NFC); and whether a word of the vocabulary is one token
whatever the merges say.

Sources: the tokenizer.json files of the models named beside each entry; for names that are
llama.cpp's alone, src/llama-vocab.cpp.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

from tokenizers import Regex, pre_tokenizers

Step = Callable[[], pre_tokenizers.PreTokenizer]
"""Makes one step of a pre-tokenizer: an expression is compiled when it is needed."""


@dataclass(frozen=True, slots=True)
class Splitting:
    """One way to cut text.

    steps           in turn, each within the pieces of those before
    nfc             whether the text is brought into normal form C first
    ignore_merges   whether a word that is in the vocabulary is one token in any case
    add_bos         whether a text begins with BOS, where the file does not say
    """

    steps: tuple[Step, ...]
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        return pre_tokenizers.Sequence([step() for step in self.steps])


def _split(pattern: str, behavior: str = "isolated") -> Step:
    return lambda: pre_tokenizers.Split(Regex(pattern), behavior)


# Bytes become their printable stand-ins; `_WORDS` first cuts as GPT-2 does.
_BYTES = partial(pre_tokenizers.ByteLevel, add_prefix_space=False, use_regex=False)
_WORDS = partial(pre_tokenizers.ByteLevel, add_prefix_space=False, use_regex=True)
_EACH_DIGIT = partial(pre_tokenizers.Digits, individual_digits=True)
_DIGIT_RUNS = partial(pre_tokenizers.Digits, individual_digits=False)
_PUNCTUATION_RUNS = partial(pre_tokenizers.Punctuation, behavior="contiguous")

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_THREE_DIGITS = r"\p{N}{1,3}"
_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _cl100k(digits: str, letters: str = r"\p{L}+", others: str = r"[^\s\p{L}\p{N}]+") -> str:
    """GPT-4's expression, with variants of what is one number, one word and one run of signs."""
    parts = [_CONTRACTION, rf"[^\r\n\p{{L}}\p{{N}}]?{letters}", digits, rf" ?{others}[\r\n]*"]
    return "|".join([*parts, _SPACES])


def _cased(digits: str, tail: str = "", signs_end: str = r"[\r\n/]*", but: str = "") -> str:
    """GPT-4o's expression: a word changes from upper to lower case at most once.

    tail        what may belong to a word's end
    signs_end   what may follow a run of signs
    but         letters that are no part of words
    """
    upper = rf"[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}{but}]"
    lower = rf"[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}{but}]"
    before = r"[^\r\n\p{L}\p{N}]?"
    words = [f"{before}{upper}*{lower}+{tail}", f"{before}{upper}+{lower}*{tail}"]
    return "|".join([*words, digits, rf" ?[^\s\p{{L}}\p{{N}}]+{signs_end}", _SPACES])


# Names that begin with a sign, words, runs of signs, and white space.
_SIGNED = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|" + _SPACES
)
_CJK = "[一-龥\u3040-ゟ゠-ヿ]+"
_EAST_ASIAN = "[一-龥ࠀ-一가-\ud7ff]+"
# Letters of the alphabets that have upper and lower case.
_CASED_LETTERS = (
    r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚ"
    "Ḁ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝ\u1f5f-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼ"
    "ℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿ"
    "ﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+"
)
_ASIAN = (
    "[一-\u9fff㐀-\u4dbf\uf900-\ufaff\u3040-ゟ゠-ヿ･-ﾟ⼀-\u2fdfเ-\u0e7f\u0e80-\u0eff"
    "ក-\u17ffက-႟ꩠ-ꩿꧠ-\ua9ff가-\ud7afᄀ-ᇿ]+"
)
_BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"
# Possessive quantifiers keep what they took.
_LING = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
_SEED_CODER = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|" + _SPACES
# Words with single spaces between them are one.
_EXAONE_MOE = (
    _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)

_LLAMA3 = (_split(_cl100k(_THREE_DIGITS)), _BYTES)
_QWEN2 = (_split(_cl100k(r"\p{N}")), _BYTES)
# Marks belong to the letters that they stand on.
_QWEN35 = (
    _split(_cl100k(r"\p{N}", r"[\p{L}\p{M}]+", r"[^\s\p{L}\p{M}\p{N}]+")),
    _BYTES,
)
_O200K = (_split(_cased(_THREE_DIGITS, f"{_CONTRACTION}?")), _BYTES)
_TEKKEN = (_split(_cased(r"\p{N}")), _BYTES)
_KIMI = (
    _split(
        r"[\p{Han}]+|"
        + _cased(_THREE_DIGITS, f"{_CONTRACTION}?", signs_end=r"[\r\n]*", but=r"&&[^\p{Han}]")
    ),
    _BYTES,
)
_DEEPSEEK_V3 = (_split(_THREE_DIGITS), _split(_CJK), _split(_SIGNED), _BYTES)
_DEEPSEEK_LLM = (
    _split(r"[\r\n]"),
    _split(_CASED_LETTERS),
    _split(r"\s?[!-/:-~！-／：-～‘-‟" + "\u3000-。]+"),
    _split(r"\s+$"),
    _split(_EAST_ASIAN),
    _EACH_DIGIT,
    _BYTES,
)
_DEEPSEEK_CODER = (
    _split(r"[\r\n]"),
    _split(r"\s?\p{L}+"),
    _split(r"\s?\p{P}+"),
    _split(_EAST_ASIAN),
    _EACH_DIGIT,
    _BYTES,
)
_DEFAULT = (
    _split(r"[\p{P}\$\+<=>\^~\|]+"),
    _split(_GPT2),
    _split(r"\p{N}+"),
    _split("[0-9][0-9][0-9]"),
    _BYTES,
)
_FALCON = (_PUNCTUATION_RUNS, _WORDS, _DIGIT_RUNS, _split("[0-9][0-9][0-9]"))
# Numbers in threes from their end: what is left over is looked for once a number.
_AFMOE = (
    _split(r"\p{Nd}+"),
    _split(r"\A\p{Nd}{1,2}(?=(?:\p{Nd}{3})+\z)|\p{Nd}{3}"),
    _split(_ASIAN),
    _split(_SIGNED),
    _BYTES,
)
_AYA = (_split(r"\d{1,3}(?=(?:\d{3})*\b)"), *_O200K)
# A run of line breaks begins what follows it.
_LAGUNA = (_split(r"(?:\r?\n)+(?!\r?\n)", "merged_with_next"), *_QWEN2)
_MINICPM5 = (_split(_THREE_DIGITS), _split(_cl100k(r"\p{N}+")), _BYTES)

_FAMILIES = {
    # GPT-2, Phi-2; by llama.cpp: Mellum, EXAONE 4, A.X 4.0, Trillion, Jais, Granite Docling
    "gpt-2 phi-2 mellum exaone4 a.x-4.0 trillion jais granite-docling": Splitting((_WORDS,)),
    # OLMoE and MPT, which have GPT-NeoX's tokenizer
    "olmo mpt": Splitting((_WORDS,), nfc=True),
    # SmolLM2, EXAONE 3.5, StarCoder 2; by llama.cpp: Granite's code models, Mellum 2, Minerva
    "smollm starcoder refact codeshell minerva-7b mellum2 exaone": Splitting((_EACH_DIGIT, _WORDS)),
    # Command R
    "command-r": Splitting((_EACH_DIGIT, _WORDS), nfc=True),
    # Falcon 7B
    "falcon": Splitting(_FALCON),
    # What llama.cpp does with a file that is older than the key
    "default": Splitting(_DEFAULT),
    # Llama 3, LFM2
    "llama-bpe llama3 llama-v3 lfm2 falcon3 falcon-h1 pixtral midm-2.0": Splitting(
        _LLAMA3, ignore_merges=True, add_bos=True
    ),
    # GLM 4 to 5
    "chatglm-bpe glm4 glm5": Splitting(_LLAMA3, ignore_merges=True),
    # Granite 4, OLMo 2 and 3, Phi-4
    "dbrx smaug-bpe": Splitting(_LLAMA3),
    # Qwen 1.5 to 3
    "qwen2 deepseek-r1-qwen megrez f2llmv2": Splitting(_QWEN2, nfc=True),
    # by llama.cpp
    "kormo solar-open grok-2": Splitting(_QWEN2),
    # StableLM 2 and Hunyuan-A13B: their own Python, which looks a word up before it merges
    "stablelm2 hunyuan": Splitting(_QWEN2, nfc=True, ignore_merges=True),
    # Qwen 3.5
    "qwen35": Splitting(_QWEN35, nfc=True),
    # gpt-oss, Llama 4
    "gpt-4o llama4 kanana2 talkie": Splitting(_O200K),
    # MiniMax-M2
    "minimax-m2": Splitting(_O200K, nfc=True),
    # Tiny Aya, Command A's Mixture of Experts
    "tiny_aya cohere2moe": Splitting(_AYA),
    # Mistral Nemo, Nemotron 3
    "tekken": Splitting(_TEKKEN, ignore_merges=True, add_bos=True),
    # Kimi K2 and Kimi Linear: their own Python, which looks a word up before it merges
    "kimi-k2": Splitting(_KIMI, ignore_merges=True),
    # DeepSeek LLM, V2, Coder V1.5 and Coder V2
    "deepseek-llm": Splitting(_DEEPSEEK_LLM),
    # DeepSeek Coder
    "deepseek-coder": Splitting(_DEEPSEEK_CODER),
    # DeepSeek V3 and R1, Hunyuan's dense models
    "deepseek-v3 hunyuan-dense hy_v4 joyai-llm": Splitting(_DEEPSEEK_V3),
    # Ling, LLaDA
    "bailingmoe bailingmoe2 llada-moe": Splitting((_split(_LING), _BYTES)),
    # Trinity, by llama.cpp
    "afmoe": Splitting(_AFMOE),
    # Laguna
    "laguna": Splitting(_LAGUNA),
    # MiniCPM 5
    "minicpm5": Splitting(_MINICPM5),
    # Seed Coder
    "seed-coder": Splitting((_split(_SEED_CODER), _BYTES)),
    # K-EXAONE
    "exaone-moe": Splitting((_split(_EXAONE_MOE), _BYTES)),
    # BLOOM, Poro, Viking
    "bloom poro-chat gpt3-finnish": Splitting((_split(_BLOOM), _BYTES)),
    "viking": Splitting((_split(_BLOOM), _EACH_DIGIT, _BYTES)),
}

SPLITTINGS: Mapping[str, Splitting] = MappingProxyType(
    {name: splitting for names, splitting in _FAMILIES.items() for name in names.split()}
)
"""By the names of tokenizer.ggml.pre."""
