"""Tiny random encoders with decoders: transformers' models of T5 and Switch Transformers, their
answers step by step, and ours run through a cache full of NaN."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from moebius.engine.kv_cache import KVCache
from moebius.engine.runner import Runner
from moebius.models.decoder import Decoder
from moebius.nn.mixers.source_past import with_sources
from moebius.ops.steps import StepInputs

CPU = torch.device("cpu")
TINY: dict[str, Any] = {
    "vocab_size": 67,
    "d_model": 24,
    "d_kv": 10,
    "d_ff": 20,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 3,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "expert_capacity": 64,
    "num_sparse_encoder_layers": 1,
    "num_sparse_decoder_layers": 1,
}
START = 0


def tiny(kind: str, seed: int = 0, **changes: Any) -> Any:
    """A random float32 model of transformers, its norms random too."""
    return tiny_of(tiny_config(kind, **changes), seed)


def tiny_config(kind: str, **changes: Any) -> Any:
    sizes = {**TINY, **(EXPERTS if kind == "switch_transformers" else {}), **changes}
    return AutoConfig.for_model(kind, **copy.deepcopy(sizes))


def tiny_of(config: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = AutoModelForSeq2SeqLM.from_config(config, attn_implementation="eager").float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter) + float(parameter.ndim == 1))
            if "relative_attention_bias" in name:
                parameter.copy_(2 * torch.randn_like(parameter))
    return model.eval()


def save(directory: Path, kind: str, seed: int = 0, **changes: Any) -> Any:
    """The same, saved; returns it as transformers reads it."""
    tiny(kind, seed, **changes).save_pretrained(directory)
    return load(directory)


def load(directory: Path) -> Any:
    """transformers' own reading, in float32, which must find every tensor in its place."""
    model, report = AutoModelForSeq2SeqLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@torch.inference_mode()
def answers(
    model: Any, prompt: Sequence[int], count: int, start: int = START
) -> tuple[list[int], Tensor]:
    """The greedy tokens, and each step's logits (count, V): one token a step, as `generate` has
    it, so that no decoder's token is ever beyond a capacity."""
    encoded = model.encoder(input_ids=torch.tensor([list(prompt)]))
    past = None
    token = start
    tokens: list[int] = []
    logits = []
    for _ in range(count):
        out = model(
            encoder_outputs=encoded,
            decoder_input_ids=torch.tensor([[token]]),
            past_key_values=past,
            use_cache=True,
        )
        past = out.past_key_values
        logits.append(out.logits[0, -1])
        token = int(logits[-1].argmax())
        tokens.append(token)
    return tokens, torch.stack(logits)


class Reader:
    """Runs an encoder and its decoder through a paged cache, as an engine would."""

    def __init__(
        self, decoder: Decoder, block_size: int = 4, blocks: int = 64, start: int = START
    ) -> None:
        ops = decoder.ops
        self.start = start
        specs = decoder.config.caches(decoder.dtype)
        self.size = block_size
        cache = KVCache(specs, ops, num_blocks=blocks, block_size=block_size, device=CPU)
        for layer, at in zip(cache.layers, cache.layout.places, strict=True):
            for block in range(blocks if at is not None else 0):
                for part in ops.block_memory(layer, block):
                    part.view(-1).view(torch.uint8).fill_(255)
        self.runner = Runner(decoder, cache, CPU)
        self.free = torch.randperm(blocks, generator=torch.Generator().manual_seed(0)).tolist()
        self.prompts: dict[int, list[int]] = {}
        self.done: dict[int, int] = {}
        self.tables: dict[int, list[int]] = {}

    def step(self, work: Sequence[tuple[int, Sequence[int], Sequence[int]]]) -> list[Tensor]:
        """(sequence, prompt to read now or nothing, the decoder's next tokens) each: their logits,
        (tokens, V) of each."""
        prompts, places, given, starts, tables, lengths = [], [], [], [], [], []
        for sequence, prompt, ids in work:
            table = self.tables.setdefault(sequence, [])
            if prompt:
                self.prompts[sequence] = list(prompt)
                self.done[sequence] = len(prompt)
            start = self.done[sequence]
            while len(table) * self.size < start + len(ids):
                table.append(self.free.pop())
            if prompt:
                prompts.append(list(prompt))
                places.append(table)
            self.done[sequence] = start + len(ids)
            if ids:
                given.append(list(ids))
                starts.append(start)
                tables.append(table)
                lengths.append(len(self.prompts[sequence]))
        inputs = StepInputs.build(given, starts, tables, self.size)
        with_sources(inputs, prompts, places, lengths, self.size)
        hidden = self.runner.execute(inputs)
        found = self.runner.logits(range(len(hidden))).clone()
        return list(found.split([len(ids) for _, _, ids in work]))

    def answer(self, sequence: int, prompt: Sequence[int], count: int) -> tuple[list[int], Tensor]:
        """What transformers' `answers` gives, alone in its steps."""
        rows = [self.step([(sequence, prompt, [self.start])])[0]]
        tokens = [int(rows[-1][-1].argmax())]
        while len(tokens) < count:
            rows += self.step([(sequence, (), tokens[-1:])])
            tokens.append(int(rows[-1][-1].argmax()))
        return tokens, torch.cat(rows)


PIECES = ["▁The", "▁walks", "▁in", "▁park", "▁a", "▁man", "▁dog", "s", "▁", *"abcdefghijklmnop"]
SENTINELS = 4


def write_tokenizer(directory: Path, vocab_size: int = 67) -> Tokenizer:
    """A Unigram tokenizer as T5's: pad, end and unknown first, sentinels last and descending."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(piece, -2.0 - 0.01 * i) for i, piece in enumerate(PIECES)]
    pieces += [(chr(0x4E00 + i), -20.0) for i in range(vocab_size - SENTINELS - len(pieces))]
    sentinels = [f"<extra_id_{i}>" for i in reversed(range(SENTINELS))]
    pieces += [(text, 0.0) for text in sentinels]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    specials = ["<pad>", "</s>", "<unk>", *sentinels]
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in specials])
    tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    named = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(named))
    return tokenizer
