"""A GGUF file served here and by llama.cpp, beside the same file widened to float32.

    python benchmarks/file_quality.py FILE.gguf --llama BUILD/bin [--json FILE]

The baseline is transformers' model of the file: every weight widened to float32 by gguf-py, and
computed in float32. Three comparisons:

- Chunks of this repository's documents are read by all. llama-perplexity tells how far llama.cpp's
  distributions are from the baseline's (llama_divergence.py); ours are held to the same rows.
- The conversations of prompts.txt are answered greedily by both engines: template, token ids and
  answers. Answers of arithmetic in 8 bits can be equal only as far as one token is preferred by
  more than that arithmetic moves the gap between two. So for each first difference the record has
  the baseline's gap between both tokens, in units of the root mean square of what both engines
  move such gaps by.
- llama.cpp's answers are read by ours and the baseline, token by token, and the first few by
  llama-server too, which is asked for the probabilities of its whole vocabulary: for what gaps are
  moved by, how often all find the same token most likely, and divergence once more.

transformers, gguf and accelerate have to be installed.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_divergence import Coded, Text, divergence
from moebius import LLM, SamplingParams
from moebius.inspect.corpus import Document
from moebius.text import Tokenizer, load_text
from readings import Distance, LlamaServer, Ours, Reading, Theirs, compare, llama
from records import processor, save

HERE = Path(__file__).resolve().parent
Message = dict[str, str]
Answers = list[list[int]]
CONTEXT = 1024
CACHE_BYTES = 2**27
CHUNK = 512
OURS: Mapping[str, Mapping[str, str]] = {
    "as served": {},
    "float32": {"dtype": "float32"},
    "float32, activations as they are": {"dtype": "float32", "activations": "float"},
    "KV cache in int8": {"kv_cache_dtype": "int8"},
    "float32, KV cache in int8": {"dtype": "float32", "kv_cache_dtype": "int8"},
}
ANSWERED = ("as served", "float32")
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


def our_answers(given: argparse.Namespace, options: Mapping[str, Any], asked: Asked) -> Answers:
    # The cache would be half of the free memory, and a second engine comes before it is given back.
    limits = {"threads": given.threads, "kv_cache_memory_bytes": 2 * CACHE_BYTES}
    with LLM(str(given.file), **limits, **options) as llm:
        params = SamplingParams(temperature=0, max_tokens=given.tokens)
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

    def record(
        self, asked: Asked, baseline: Baseline, text: Tokenizer, ends: frozenset[int]
    ) -> dict[str, Any]:
        """Where they part, and how far apart the baseline finds the two tokens.

        Of an answer that is over the token is the likeliest of those that end one.
        """
        parted = []
        same_tokens = 0
        for prompt, ours, theirs in zip(asked.prompts, self.first, self.second, strict=True):
            if ours == theirs:
                same_tokens += len(ours)
                continue
            at = next(i for i in range(len(ours) + 1) if ours[i : i + 1] != theirs[i : i + 1])
            same_tokens += at
            ids = prompt + ours[:at]
            [[row_V]] = baseline.rows(Reading([*ids, 0], len(ids) - 1))
            end = max(ends, key=lambda token: float(row_V[token]))
            one = ours[at] if at < len(ours) else end
            other = theirs[at] if at < len(theirs) else end
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


def on_documents(
    given: argparse.Namespace, baseline: Baseline, ours: Mapping[str, Ours], text: Tokenizer
) -> dict[str, Any]:
    """What the scored halves of chunks tell of each engine; of llama.cpp its own tool tells it."""
    files = sorted((HERE.parent / "docs").glob("*.md"))
    documents = [Document(each.name, "text", each.read_text(encoding="utf-8")) for each in files]
    known = Text.of(documents, text, CHUNK, given.chunks)
    known.coded = [Coded.of(rows) for rows in known.read(baseline)]
    found = {label: known.judge(known.read(reader)) for label, reader in ours.items()}
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        known.write(base)
        tool = given.llama / "llama-perplexity"
        found["llama.cpp"] = divergence(tool, given.file, base, CHUNK, given.threads)
    engines = {label: each._asdict() for label, each in found.items()}
    return {"tokens": sum(map(len, known.targets)), "engines": engines}


def on_answers(
    given: argparse.Namespace,
    baseline: Baseline,
    ours: Mapping[str, Ours],
    text: Tokenizer,
    asked: Asked,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, Distance]]:
    """Of all answers, and of those that llama-server reads too; and the latter as distances."""
    sizes = torch.tensor([len(text.token_bytes(i)) for i in range(text.vocab_size)])
    readings = [
        Reading(prompt + answer, len(prompt) - 1)
        for prompt, answer in zip(asked.prompts, asked.answers, strict=True)
    ]
    every = compare({"baseline": baseline, **ours}, readings, sizes)
    with llama(given.llama / "llama-server", given.file, given.threads, CONTEXT) as server:
        theirs = Theirs(server, given.file, text.vocab_size)
        readers = {"baseline": baseline, **ours, "llama.cpp": theirs}
        some = compare(readers, readings[: given.read_by_llama], sizes)
    records = ([each.record() for each in found.values()] for found in (every, some))
    return (*records, some)


def measured(given: argparse.Namespace) -> dict[str, Any]:
    text, defaults = load_text(given.file)
    ends = defaults.eos_ids
    chats = conversations(HERE / "prompts.txt")[: given.prompts]
    with llama(given.llama / "llama-server", given.file, given.threads, CONTEXT) as server:
        asked = ask_llama(server, text, chats, given.tokens)
        version = server.get("/props")["build_info"]
    answers = {label: our_answers(given, OURS[label], asked) for label in ANSWERED}
    _tell(f"{len(chats)} conversations answered by both")
    baseline = Baseline(given.file)
    limits = {"threads": given.threads, "kv_cache_memory_bytes": CACHE_BYTES}
    ours = {label: Ours(given.file, CONTEXT, **limits, **more) for label, more in OURS.items()}
    documents = on_documents(given, baseline, ours, text)
    _tell(f"documents read: {documents}")
    every, some, distances = on_answers(given, baseline, ours, text, asked)
    theirs = [without_end(each, ends) for each in asked.answers]
    pairs = {}
    for label in ANSWERED:
        rms = math.hypot(distances[label].gap_rms, distances["llama.cpp"].gap_rms)
        pair = Pair([without_end(each, ends) for each in answers[label]], theirs, rms)
        pairs[label] = pair.record(asked, baseline, text, ends)
    return {
        "processor": processor(),
        "file": given.file.name,
        "sha256": hashlib.sha256(given.file.read_bytes()).hexdigest(),
        "llama.cpp": version,
        "prompts": len(chats),
        "same_template": asked.same_text,
        "same_ids": asked.same_ids,
        "documents": documents,
        "answers": every,
        "answers_read_by_llama": some,
        "greedy": pairs,
    }


def _tell(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="a GGUF file whose architecture is llama")
    parser.add_argument("--llama", type=Path, required=True, help="llama.cpp's programs")
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=48, help="of an answer")
    parser.add_argument("--read-by-llama", type=int, default=8, help="answers")
    parser.add_argument("--chunks", type=int, default=8, help=f"of {CHUNK} tokens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    record = measured(given)
    save(given.json, record)
    print(f"template {record['same_template']}, ids {record['same_ids']} of {record['prompts']}")
    for label, each in record["documents"]["engines"].items():
        print(f"documents, {label}: {each}")
    for each in record["answers"] + record["answers_read_by_llama"]:
        print(
            f"{each['label']:34} divergence {each['mean_divergence']:.6f}  "
            f"same choice {each['same_choice']:.2%}  gap moved {each['gap_moved_rms']:.4f}  "
            f"({each['tokens']:,} tokens)"
        )
    for label, pair in record["greedy"].items():
        print(
            f"{label:24} equal {pair['equal']} of {pair['answers']}, near {pair['near']} of "
            f"{len(pair['parted'])}, widest gap {pair['widest_gap_in_rms']:.2f} rms"
        )


if __name__ == "__main__":
    main()
