"""A GGUF file served here and by llama.cpp, beside the same file widened to float32.

    python benchmarks/file_quality.py FILE.gguf --llama BUILD/bin/llama-server \\
        --json benchmarks/file_quality.json

The baseline is transformers' model of the file: every weight widened to float32 by gguf-py, and
computed in float32. Its greedy answers to the conversations of prompts.txt, and rows of this
repository's documents, are read by all others token by token, so that all tell what comes next
behind the same tokens. For each of them the record has the mean Kullback-Leibler divergence of its
distribution from the baseline's, in nats, how often both find the same token most likely, and how
far it moves the gap between the baseline's two most likely tokens.

Then both engines answer the conversations greedily by themselves. Answers of arithmetic in 8 bits
can be equal only as far as the baseline prefers one token by more than that arithmetic moves the
gap; so the record has, for each first difference, what the baseline's gap between both tokens is,
in units of the root mean square of what the two engines moved such gaps by.

transformers, gguf and accelerate have to be installed.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moebius import LLM, SamplingParams
from moebius.bench.quality import token_rows
from moebius.inspect.corpus import Document
from moebius.text import Tokenizer, load_text
from readings import Distance, LlamaServer, Ours, Reader, Reading, Theirs, compare, llama
from records import processor, save

HERE = Path(__file__).resolve().parent
Message = dict[str, str]
Answers = list[list[int]]
CONTEXT = 1024
CACHE_BYTES = 2**27
ROW = 256
OURS: Mapping[str, Mapping[str, str]] = {
    "as served": {},
    "float32": {"dtype": "float32"},
    "float32, activations as they are": {"dtype": "float32", "activations": "float"},
    "KV cache in int8": {"kv_cache_dtype": "int8"},
    "float32, KV cache in int8": {"dtype": "float32", "kv_cache_dtype": "int8"},
}
THEIRS: Mapping[str, Mapping[str, str]] = {
    "llama.cpp": {},
    "llama.cpp, KV cache in float32": {"cache_type_k": "f32", "cache_type_v": "f32"},
}
ANSWERED = ("as served", "float32")
PAIRS = (
    *((label, "llama.cpp") for label in ANSWERED),
    *((label, "baseline") for label in (*ANSWERED, "llama.cpp")),
)
NEAR = 3.0
"""Gaps of fewer root mean squares than this are called near."""


def conversations(path: Path) -> list[list[Message]]:
    """A prompt a line; every fifth with a system message, every fifth behind an earlier turn."""
    prompts = path.read_text(encoding="utf-8").splitlines()
    found = []
    for number, prompt in enumerate(prompts):
        messages = [{"role": "user", "content": prompt}]
        if number % 5 == 3:
            messages = [
                {"role": "user", "content": prompts[number - 1]},
                {"role": "assistant", "content": "I would rather not say.\n"},
                *messages,
            ]
        if number % 5 == 4:
            messages.insert(0, {"role": "system", "content": "Answer briefly, in plain words."})
        found.append(messages)
    return found


class Baseline:
    """transformers' model of the file, in float32."""

    def __init__(self, file: Path) -> None:
        from transformers import AutoModelForCausalLM, logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self._model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32
        ).eval()
        self.weight_bytes = 4 * self._model.num_parameters()

    def rows(self, reading: Reading) -> Iterator[Tensor]:
        """See Reader."""
        with torch.inference_mode():
            logits_TV = self._model(torch.tensor([reading.ids[:-1]])).logits[0]
            yield F.log_softmax(logits_TV[reading.start :].double(), dim=-1)

    @torch.inference_mode()
    def answer(self, ids: Sequence[int], count: int, ends: frozenset[int]) -> list[int]:
        """Greedily."""
        given = torch.tensor([ids])
        out = self._model.generate(
            given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=sorted(ends),
            pad_token_id=0,
        )
        return out[0, len(ids) :].tolist()


@dataclass
class Asked:
    """The conversations as tokens, how many are the same to llama.cpp, and its answers."""

    prompts: list[list[int]] = field(default_factory=list)
    same_text: int = 0
    same_ids: int = 0
    answers: list[list[int]] = field(default_factory=list)


def ask_llama(
    server: LlamaServer, text: Tokenizer, chats: Sequence[Sequence[Message]], count: int
) -> Asked:
    """Its template, its tokens, and its greedy answers of up to `count` tokens."""
    found = Asked()
    for messages in chats:
        ids = text.encode_chat(messages)
        their_text = server.ask("/apply-template", {"messages": messages})["prompt"]
        tokenize = {"content": their_text, "add_special": True, "parse_special": True}
        greedy = {"prompt": ids, "n_predict": count, "temperature": 0, "cache_prompt": False}
        greedy |= {"samplers": ["top_k"], "top_k": 1, "return_tokens": True}
        found.prompts.append(ids)
        found.same_text += text.decode(ids, skip_special_tokens=False) == their_text
        found.same_ids += ids == server.ask("/tokenize", tokenize)["tokens"]
        found.answers.append(server.ask("/completion", greedy)["tokens"])
    return found


def our_answers(file: Path, options: Mapping[str, Any], asked: Asked, count: int) -> Answers:
    # The cache would be half of the free memory, and a second engine comes before it is given back.
    with LLM(str(file), kv_cache_memory_bytes=2 * CACHE_BYTES, **options) as llm:
        params = SamplingParams(temperature=0, max_tokens=count)
        outputs = llm.generate(asked.prompts, params, progress=False)
    return [list(each.outputs[0].token_ids) for each in outputs]


def without_end(answer: Sequence[int], ends: frozenset[int]) -> list[int]:
    """Whether the token that ends an answer is shown is each engine's own affair."""
    return list(answer[:-1] if answer and answer[-1] in ends else answer)


@dataclass(frozen=True)
class Pair:
    """Two engines' answers to the same prompts, and a measure of their arithmetic.

    rms   of what both moved gaps by, each independently of the other
    """

    first: Answers
    second: Answers
    rms: float

    def record(self, asked: Asked, baseline: Baseline, text: Tokenizer, end: int) -> dict[str, Any]:
        """Where they part, and how far apart the baseline finds the two tokens."""
        parted = []
        same_tokens = 0
        for prompt, ours, theirs in zip(asked.prompts, self.first, self.second, strict=True):
            if ours == theirs:
                same_tokens += len(ours)
                continue
            at = next(i for i in range(len(ours) + 1) if ours[i : i + 1] != theirs[i : i + 1])
            same_tokens += at
            one, other = ((each[at:] or [end])[0] for each in (ours, theirs))
            ids = prompt + ours[:at]
            [[row_V]] = baseline.rows(Reading([*ids, one], len(ids) - 1))
            gap = float(row_V[one] - row_V[other])
            parted.append(
                {
                    "prompt": text.decode(prompt[-12:]),
                    "token": at,
                    "first": text.decode([one], skip_special_tokens=False),
                    "second": text.decode([other], skip_special_tokens=False),
                    "baseline_chooses": int(row_V.argmax() == one) - int(row_V.argmax() == other),
                    "gap": gap,
                    "gap_in_rms": abs(gap) / self.rms,
                }
            )
        return {
            "answers": len(self.first),
            "equal": len(self.first) - len(parted),
            "tokens_before_they_part": same_tokens,
            "near": sum(each["gap_in_rms"] < NEAR for each in parted),
            "widest_gap_in_rms": max((each["gap_in_rms"] for each in parted), default=0.0),
            "gap_rms": self.rms,
            "parted": parted,
        }


def document_rows(text: Tokenizer, tokens: int) -> list[Reading]:
    """Rows of this repository's documents."""
    files = sorted((HERE.parent / "docs").glob("*.md"))
    documents = [Document(each.name, "text", each.read_text(encoding="utf-8")) for each in files]
    return [Reading(row) for row in token_rows(documents, text, ROW, tokens)]


def distances(
    given: argparse.Namespace, baseline: Baseline, text: Tokenizer, readings: Sequence[Reading]
) -> dict[str, Distance]:
    vocab = text.vocab_size
    sizes = torch.tensor([len(text.token_bytes(i)) for i in range(vocab)])
    limits = {"threads": given.threads, "kv_cache_memory_bytes": CACHE_BYTES}
    readers: dict[str, Reader] = {"baseline": baseline}
    for label, options in OURS.items():
        readers[label] = Ours(given.file, CONTEXT, **limits, **options)
    with ExitStack() as stack:
        for label, more in THEIRS.items():
            server = llama(given.llama, given.file, given.threads, CONTEXT, **more)
            readers[label] = Theirs(stack.enter_context(server), given.file, vocab)
        return compare(readers, readings, sizes)


def measured(given: argparse.Namespace) -> dict[str, Any]:
    text, defaults = load_text(given.file)
    ends = defaults.eos_ids
    chats = conversations(HERE / "prompts.txt")[: given.prompts]
    with llama(given.llama, given.file, given.threads, CONTEXT) as server:
        asked = ask_llama(server, text, chats, given.tokens)
        version = server.get("/props")["build_info"]
    answers = {"llama.cpp": asked.answers}
    for label in ANSWERED:
        answers[label] = our_answers(given.file, OURS[label], asked, given.tokens)
    print(f"{len(chats)} conversations answered by both", file=sys.stderr, flush=True)
    baseline = Baseline(given.file)
    answers["baseline"] = [baseline.answer(each, given.tokens, ends) for each in asked.prompts]
    readings = [
        Reading(prompt + answer, len(prompt) - 1)
        for prompt, answer in zip(asked.prompts, answers["baseline"], strict=True)
    ]
    readings += document_rows(text, given.text_tokens)
    found = distances(given, baseline, text, readings)
    plain = {label: [without_end(one, ends) for one in each] for label, each in answers.items()}
    pairs = {}
    for first, second in PAIRS:
        rms = math.hypot(found[first].gap_rms, found[second].gap_rms)
        pair = Pair(plain[first], plain[second], rms)
        pairs[f"{first} and {second}"] = pair.record(asked, baseline, text, min(ends))
    return {
        "processor": processor(),
        "file": given.file.name,
        "sha256": hashlib.sha256(given.file.read_bytes()).hexdigest(),
        "llama.cpp": version,
        "prompts": len(chats),
        "same_template": asked.same_text,
        "same_ids": asked.same_ids,
        "divergence": [each.record() for each in found.values()],
        "greedy": pairs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="a GGUF file whose architecture is llama")
    parser.add_argument("--llama", type=Path, required=True, help="llama.cpp's llama-server")
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--text-tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    record = measured(given)
    print(f"template {record['same_template']}, ids {record['same_ids']} of {record['prompts']}")
    for each in record["divergence"]:
        print(
            f"{each['label']:34} divergence {each['mean_divergence']:.6f}  "
            f"same choice {each['same_choice']:.2%}  gap moved {each['gap_moved_rms']:.4f}  "
            f"({each['tokens']:,} tokens)"
        )
    for name, pair in record["greedy"].items():
        print(
            f"{name:24} equal {pair['equal']} of {pair['answers']}, near {pair['near']}, "
            f"widest gap {pair['widest_gap_in_rms']:.2f} rms"
        )
    save(given.json, record)


if __name__ == "__main__":
    main()
