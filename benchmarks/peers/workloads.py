"""The seeded request lists that every engine gets: token ids in, exact numbers of tokens out."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

NAMES = ("w1", "w2", "w3", "w4", "w5")

# Lengths come from one stream and never change; token ids come from one stream per draw.
_LENGTHS_SEED = 1234
# Ids below are byte tokens and specials, ids at the very end may be fillers of the vocabulary.
_FIRST_ID = 300
_LAST_IDS = 64


@dataclass(frozen=True, slots=True)
class Request:
    """Token ids of a prompt and how many tokens to generate, no more and no fewer."""

    prompt: list[int]
    output: int


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests that arrive at once. At most `concurrency` run; the first `shared_prefix` tokens are
    common to all."""

    name: str
    requests: list[Request]
    concurrency: int
    shared_prefix: int = 0

    @property
    def output_tokens(self) -> int:
        return sum(request.output for request in self.requests)


def workload(name: str, vocab: int, draw: int) -> Workload:
    """Draw number `draw` of a workload: the same lengths, other token ids, so that no earlier
    draw's cache helps.

    Draw 0 is the warm-up: the first requests that run together, with few output tokens. Raises
    ValueError.
    """
    full = _full(name, vocab, random.Random(f"{name}-tok-{draw}"))
    if draw:
        return full
    few = 16 if name == "w1" else 3
    first = [replace(r, output=min(r.output, few)) for r in full.requests[: full.concurrency]]
    return replace(full, requests=first)


def _full(name: str, vocab: int, ids: random.Random) -> Workload:
    def tokens(count: int) -> list[int]:
        return [ids.randrange(_FIRST_ID, vocab - _LAST_IDS) for _ in range(count)]

    if name == "w1":
        return Workload(name, [Request(tokens(128), 128)], concurrency=1)
    if name == "w2":
        lengths = random.Random(_LENGTHS_SEED)
        pairs = [(lengths.randint(32, 256), lengths.randint(16, 256)) for _ in range(64)]
        return Workload(
            name, [Request(tokens(prompt), output) for prompt, output in pairs], concurrency=32
        )
    if name == "w3":
        prefix = tokens(1024)
        return Workload(
            name,
            [Request(prefix + tokens(32), 32) for _ in range(32)],
            16,
            shared_prefix=len(prefix),
        )
    if name == "w4":
        return Workload(name, [Request(tokens(2048), 1)], concurrency=1)
    if name == "w5":
        return Workload(name, [Request(tokens(128), 128) for _ in range(8)], concurrency=8)
    raise ValueError(f"there is no workload {name!r}; there are {', '.join(NAMES)}")
