"""Tokenizers small enough to train in a test, of the two families that models use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CORPUS = [
    "The quick brown fox jumps over the lazy dog; the dog sleeps. user assistant system tool",
    "Grüße aus Köln, naïve café, Ελληνικά, русский текст, 日本語のテキスト, 한국어",
    "def f(x):\n    return x + 1  # 😀 🙂 👩‍👩‍👧 ☃\n\n",
    "hello world hello hello world <tool_call> {}",
] * 4

CHATML = (
    "{{ bos_token }}{% for message in messages %}\n"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIALS = ["<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]


def byte_level() -> Tokenizer:
    """Byte-level BPE with an added token that is not special, and runs of spaces as added tokens
    (GPT-NeoX)."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=SPECIALS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    backend.add_tokens(
        [AddedToken("<tool_call>", normalized=False), AddedToken("    ", normalized=True)]
    )
    return backend


def _fallback_model(scheme: str | None) -> Tokenizer:
    """A BPE that falls back to byte tokens, with specials and bytes inside the vocabulary as in
    Llama's."""
    base = Tokenizer(models.BPE(unk_token="<unk>"))
    base.pre_tokenizer = pre_tokenizers.Metaspace()
    latin = [line.encode("ascii", "ignore").decode() for line in CORPUS]
    base.train_from_iterator(
        latin, trainers.BpeTrainer(vocab_size=220, special_tokens=SPECIALS[:3], show_progress=False)
    )
    model: dict[str, Any] = json.loads(base.to_str())["model"]
    order = sorted(model["vocab"], key=model["vocab"].__getitem__)
    order[3:3] = [f"<0x{b:02X}>" for b in range(256)]
    merges = [tuple(merge) for merge in model["merges"]]
    vocab = {token: i for i, token in enumerate(order)}
    backend = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    if scheme is None:
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        backend.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        backend.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
    backend.add_special_tokens(SPECIALS)
    return backend


def llama() -> Tokenizer:
    """Llama 2's way: a normaliser puts ▁ in front; BOS from the post-processor."""
    backend = _fallback_model(None)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return backend


def mistral() -> Tokenizer:
    """Mistral's way: a Metaspace pre-tokenizer puts ▁ before the first word of a text only."""
    return _fallback_model("first")


def metaspace() -> Tokenizer:
    """A Metaspace decoder without byte fallback (unigram models)."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.train_from_iterator(
        CORPUS,
        trainers.UnigramTrainer(
            vocab_size=200,
            special_tokens=SPECIALS,
            unk_token="<unk>",
            initial_alphabet=list("".join(SPECIALS)),
            show_progress=False,
        ),
    )
    return backend


def prefix_space() -> Tokenizer:
    """Byte-level BPE that begins a text with a space, and leaves spaces out of offsets (RoBERTa,
    some GPT-2s)."""
    backend = byte_level()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    return backend


def folding() -> Tokenizer:
    """A unigram model whose normaliser changes the text, as sentencepiece's do."""
    backend = metaspace()
    backend.normalizer = normalizers.NFKC()
    return backend


def word_piece() -> Tokenizer:
    """BERT's way: lower case, words with their continuations marked, and a frame from the
    post-processor."""
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=SPECIALS, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    frame = [("<s>", 0), ("</s>", 1)]
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=frame
    )
    return backend


FAMILIES = {"byte_level": byte_level, "llama": llama, "mistral": mistral, "metaspace": metaspace}
# These do not give back every text that they encode.
UNFAITHFUL = {"prefix_space": prefix_space, "folding": folding}


def save(backend: Tokenizer, directory: Path, **config: Any) -> Path:
    """A model directory with this tokenizer, ChatML as its template unless `chat_template` says
    otherwise."""
    backend.save(str(directory / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": CHATML}
    text = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **named, **config})
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")
    return directory
