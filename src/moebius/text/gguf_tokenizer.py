"""The tokenizer that a GGUF file's metadata describes, and its chat templates.

The file has tokens, their kinds, and merges or scores; how text is normalised and cut is known by
the names that it has for them (tokenizer.ggml.model and .pre). Nothing is written anywhere: the
tokenizers library's objects are made of the lists.
"""

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import replace

from tokenizers import Regex, decoders, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from moebius.errors import TokenizerError
from moebius.text.chat import ChatTemplate
from moebius.text.gguf_charsmap import charsmap_normalizer
from moebius.text.gguf_models import Built, bpe, merges_of_file, merges_of_scores, unigram
from moebius.text.gguf_pre import SPLITTINGS, Splitting
from moebius.text.gguf_values import PREFIX, flag, octets, shown, string
from moebius.text.gguf_vocabulary import ADVICE, Kind, Vocabulary, read_vocabulary
from moebius.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

_SPACE = "▁"
_TEMPLATE = "tokenizer.chat_template"
# Values of `pre` whose tokens are plain text, not bytes.
_PLAIN_TEXT_PRE = ("gemma4", "sarvam-moe")
# T5's sentinels, which llama.cpp's converter takes for padding.
_SENTINEL = re.compile(r"\[PAD\d+\]")
_SENTINELS = 100


def tokenizer_from_gguf(metadata: Mapping[str, object]) -> Tokenizer:
    """The tokenizer of a file with these keys.

    Raises TokenizerError: naming a key that is missing or wrong, or with advice where the kind of
    tokenizer is not known here.
    """
    vocabulary = read_vocabulary(metadata)
    build = _BUILDERS.get(_family(metadata, vocabulary.model))
    if build is None:
        raise TokenizerError(
            f"{PREFIX}model is {shown(vocabulary.model)}; what can be made of a file's keys is "
            f"{', '.join(_BUILDERS)}; {ADVICE}"
        )
    built = build(metadata, vocabulary)
    return Tokenizer(
        built.backend,
        vocabulary.special_tokens(),
        add_bos=_adds_bos(metadata, vocabulary),
        add_eos=_adds(metadata, vocabulary, "eos", default=vocabulary.model == "t5"),
        templates=gguf_templates(metadata),
        end_ids=vocabulary.end_ids,
        rename=built.rename,
    )


def _family(metadata: Mapping[str, object], model: str) -> str:
    plain_text = string(metadata, f"{PREFIX}pre") in _PLAIN_TEXT_PRE
    return "gemma4" if model == "gpt2" and plain_text else model


def _adds_bos(metadata: Mapping[str, object], vocabulary: Vocabulary) -> bool:
    if vocabulary.model == "gemma4":
        return False  # the flag says true, but the published tokenizer adds none: templates do
    default = vocabulary.model == "llama"
    if vocabulary.model == "gpt2":
        splitting = SPLITTINGS.get(string(metadata, f"{PREFIX}pre") or "")
        default = splitting is not None and splitting.add_bos
    return _adds(metadata, vocabulary, "bos", default)


def _adds(metadata: Mapping[str, object], vocabulary: Vocabulary, name: str, default: bool) -> bool:
    """Whether texts get this token. Raises TokenizerError where the file asks, and names none."""
    asked = flag(metadata, f"add_{name}_token")
    if asked and f"{name}_token" not in vocabulary.named:
        raise TokenizerError(
            f"{PREFIX}add_{name}_token is true, but there is no {PREFIX}{name}_token_id"
        )
    return default if asked is None else asked


def gguf_templates(metadata: Mapping[str, object]) -> dict[str, ChatTemplate]:
    """All templates of a file by name. Raises TokenizerError."""
    found: dict[str, ChatTemplate] = {}
    for key in metadata:
        if key == _TEMPLATE or key.startswith(f"{_TEMPLATE}."):
            name = key.removeprefix(_TEMPLATE).removeprefix(".") or "default"
            source = string(metadata, key)
            if source:
                found[name] = ChatTemplate(source, name)
    return found


def _byte_level(metadata: Mapping[str, object], vocabulary: Vocabulary) -> Built:
    """GPT-2's kind of BPE: bytes as printable stand-ins, words cut as `pre` says."""
    splitting = _splitting(metadata)
    built = bpe(vocabulary, merges_of_file(metadata), ignore_merges=splitting.ignore_merges)
    if splitting.nfc:
        built.backend.normalizer = normalizers.NFC()
    built.backend.pre_tokenizer = splitting.pre_tokenizer()
    built.backend.decoder = decoders.ByteLevel()
    return built


def _splitting(metadata: Mapping[str, object]) -> Splitting:
    pre = string(metadata, f"{PREFIX}pre")
    if pre is None or pre == "default":
        log.warning(
            "the file does not say how its tokenizer cuts words (%spre); it is cut as llama.cpp "
            "does then, which may not be the model's way: %s",
            PREFIX,
            ADVICE,
        )
    found = SPLITTINGS.get(pre or "default")
    if found is None:
        raise TokenizerError(
            f"{PREFIX}pre is {shown(pre)}, and how that cuts words is not known here; {ADVICE}"
        )
    return found


def _sentencepiece(metadata: Mapping[str, object], vocabulary: Vocabulary) -> Built:
    """SentencePiece's BPE: spaces as ▁, and one in front of a text."""
    if f"{PREFIX}merges" in metadata:
        merges = merges_of_file(metadata)
    else:
        merges = merges_of_scores(vocabulary)
    unknown = vocabulary.special_tokens().get("unk_token")
    rstrip = _right_strips(metadata, vocabulary)
    built = bpe(vocabulary, merges, rstrip, unk_token=unknown, byte_fallback=True)
    prefix = flag(metadata, "add_space_prefix")
    _mark_spaces(built.backend, prefix is None or prefix)
    return built


def _gemma4(metadata: Mapping[str, object], vocabulary: Vocabulary) -> Built:
    """A BPE of plain text with spaces as ▁, none of them in front."""
    unknown = vocabulary.special_tokens().get("unk_token")
    built = bpe(vocabulary, merges_of_file(metadata), unk_token=unknown, byte_fallback=True)
    _mark_spaces(built.backend, prefix=False)
    return built


def _mark_spaces(backend: Backend, prefix: bool) -> None:
    """Turn spaces into ▁ and back; prefix: with one in front of each text between added tokens.

    So the tokenizer.json of Llama 2 does it, and llama.cpp for all of this kind.
    """
    marks: list[normalizers.Normalizer] = [normalizers.Replace(" ", _SPACE)]
    steps: list[decoders.Decoder] = [
        decoders.Replace(_SPACE, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if prefix:
        marks.insert(0, normalizers.Prepend(_SPACE))
        steps.append(decoders.Strip(" ", 1, 0))
    backend.normalizer = normalizers.Sequence(marks)
    backend.decoder = decoders.Sequence(steps)


def _right_strips(metadata: Mapping[str, object], vocabulary: Vocabulary) -> frozenset[int]:
    """The added tokens that take the white space behind them: Phi-3's, of which no key says so."""
    if metadata.get("general.architecture") not in ("phi3", "phimoe"):
        return frozenset()
    kept = {vocabulary.named.get("bos_token"), vocabulary.named.get("unk_token")}
    control = vocabulary.of_kind(Kind.CONTROL)
    return frozenset(
        i for i in control if i not in kept and vocabulary.tokens[i] != "<|endoftext|>"
    )


def _t5(metadata: Mapping[str, object], vocabulary: Vocabulary) -> Built:
    """SentencePiece's unigram model, with the character map of its normaliser."""
    built = unigram(_with_sentinels(vocabulary))
    built.backend.normalizer = normalizers.Sequence(_unigram_normalizers(metadata))
    prefix = flag(metadata, "add_space_prefix")
    scheme = "never" if prefix is False else "always"
    built.backend.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, scheme, split=False)
    built.backend.decoder = decoders.Metaspace(_SPACE, scheme)
    return built


def _with_sentinels(vocabulary: Vocabulary) -> Vocabulary:
    """With T5's <extra_id_99> down to <extra_id_0> in place of the first unused tokens."""
    tokens = list(vocabulary.tokens)
    kinds = list(vocabulary.kinds)
    unused = [i for i in vocabulary.of_kind(Kind.UNUSED) if _SENTINEL.fullmatch(tokens[i])]
    for number, i in enumerate(unused[:_SENTINELS]):
        tokens[i] = f"<extra_id_{_SENTINELS - 1 - number}>"
        kinds[i] = Kind.CONTROL
    return replace(vocabulary, tokens=tokens, kinds=kinds)


def _unigram_normalizers(metadata: Mapping[str, object]) -> list[normalizers.Normalizer]:
    found: list[normalizers.Normalizer] = []
    charsmap = octets(metadata, "precompiled_charsmap")
    if charsmap:
        found.append(charsmap_normalizer(charsmap, f"{PREFIX}precompiled_charsmap"))
    if flag(metadata, "remove_extra_whitespaces") is not False:
        found += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    return found


_BUILDERS: Mapping[str, Callable[[Mapping[str, object], Vocabulary], Built]] = {
    "gpt2": _byte_level,
    "llama": _sentencepiece,
    "gemma4": _gemma4,
    "t5": _t5,
}
