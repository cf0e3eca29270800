"""Ten thousand random schedules against promise P1: one answer, bit for bit.

    python benchmarks/one_answer.py --schedules 10000 --json benchmarks/one_answer.json
    python benchmarks/one_answer.py --schedules 500 --ranks 1 2 3 4
    python benchmarks/one_answer.py --quantised --json benchmarks/one_answer_quantised.json

Every schedule serves 1 to 64 requests with random batch sizes, chunk sizes, block sizes, cache
sizes (some force preemptions), arrivals, thread counts and cold or warm prefix caches, and compares
every token's log-probabilities with those of the request served alone. Models: the bundled one (one
schedule in twenty) and, of every supported architecture and of some whose layers have windows, a
random one in bfloat16 and one stored in float16, which is computed in float32; and one of three
kinds of layers, with windows and without, in bfloat16 and float32. Each of them is also served with
keys and values in int8. Ends with exit code 1 at the first difference, naming the schedule.

With --quantised, the weights are in fewer bits: every type of GGUF's blocks in linear layers,
experts, embeddings and the head, with activations in 8 bits and with activations as they are; every
kind of Hugging Face's quantised directories; and the bundled model as a GGUF file of each recipe.

With --ranks, the models that have experts are served by groups of so many ranks, each with a random
schedule of its own. Experts are placed evenly in order or anyhow, some at several ranks.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import moebius  # noqa: E402
from moebius.engine.kv_cache import block_bytes  # noqa: E402
from moebius.errors import ConfigError  # noqa: E402
from moebius.models.decoder import Decoder  # noqa: E402
from moebius.models.store.load import load_decoder  # noqa: E402
from moebius.ops.cpu import CpuOps  # noqa: E402
from moebius.ops.formats import BLOCK_FORMATS  # noqa: E402
from moebius.quantize.export import write_model  # noqa: E402
from moebius.quantize.recipe import RECIPES  # noqa: E402
from oracle import FAMILY, save_tiny  # noqa: E402
from quantised import KINDS, SIZES, write_quantised  # noqa: E402
from random_ranks import answers_of_ranks, load_ranks, random_placement  # noqa: E402
from random_schedules import (  # noqa: E402
    MAX_MODEL_LEN,
    WINDOWED,
    Answer,
    Schedule,
    Seen,
    Wish,
    alone,
    answers,
    groups_of,
    in_blocks,
    mixed,
    random_schedule,
    wishes,
)
from records import save  # noqa: E402

BUNDLED_EVERY = 20
CACHES = (None, torch.int8)
"""What keys and values are held in; None: as they are computed."""
PLACEMENTS = 3
"""Of the experts, for each model and number of ranks."""


class Served(NamedTuple):
    """What was answered, and how it came about."""

    seen: Seen
    how: str
    ranks: int = 1


class Subject:
    """A model on 1 and on 2 threads, its requests, and what each gives alone.

    directory   where it is, if it can be loaded for ranks
    kv_dtype    what keys and values are held in; None: as they are computed
    ordered     its kernels sum products of plain numbers in one order (CpuOps)
    """

    def __init__(
        self,
        name: str,
        decoders: list[Decoder],
        directory: Path | None = None,
        kv_dtype: torch.dtype | None = None,
        *,
        ordered: bool = False,
    ) -> None:
        self.ordered = ordered
        self.name = name if kv_dtype is None else f"{name}, KV cache in {kv_dtype}"
        self.kv_dtype = kv_dtype
        self.directory = directory
        self.decoders = decoders
        self.groups = groups_of(decoders[0])
        self.wishes = wishes(64, self.decoders[0].config.vocab_size, random.Random(name))
        self._expected: dict[str, Answer] = {}
        self._groups: dict[int, list[list[Decoder]]] = {}

    @property
    def has_experts(self) -> bool:
        return self.directory is not None and bool(self.decoders[0].config.experts)

    def expected(self, wish: Wish) -> Answer:
        """What the request gets where nobody else is served; computed once."""
        if wish.id not in self._expected:
            self._expected[wish.id] = alone(self.decoders[0], wish, self.kv_dtype)
        return self._expected[wish.id]

    def answers(self, some: list[Wish], rng: random.Random, ranks: Sequence[int]) -> Served:
        """Serve some of the wishes, on one of these numbers of ranks if there are any."""
        if not ranks:
            schedule = self._schedule(len(some), rng)
            return Served(answers(rng.choice(self.decoders), some, schedule), str(schedule))
        decoders = self._ranks(rng.choice(ranks), rng)
        schedules = [self._schedule(len(some), rng) for _ in decoders]
        homes = [rng.randrange(len(decoders)) for _ in some]
        seen = answers_of_ranks(decoders, some, homes, schedules)
        where = f"ranks {homes} with {schedules}"
        return Served(seen, where, len(decoders))

    def _schedule(self, count: int, rng: random.Random) -> Schedule:
        return replace(random_schedule(count, rng, self.groups), kv_dtype=self.kv_dtype)

    def _ranks(self, count: int, rng: random.Random) -> list[Decoder]:
        """Decoders of a group; of few placements, as loading takes time."""
        assert self.directory is not None
        made = self._groups.setdefault(count, [])
        if len(made) < PLACEMENTS:
            one = self.decoders[0]
            placement = random_placement(one, count, rng)
            threads = rng.choice((1, 2))
            made.append(
                load_ranks(self.directory, one.dtype, placement, threads, ordered=self.ordered)
            )
            return made[-1]
        return rng.choice(made)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--schedules", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, nargs="+", default=[])
    parser.add_argument("--seconds", type=float, help="begin no schedule after so many")
    parser.add_argument("--quantised", action="store_true", help="weights in fewer bits")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    # Products with plain weights are summed as they are served beside quantised ones.
    kernels = [CpuOps(threads, ordered=args.quantised) for threads in (1, 2)]
    with tempfile.TemporaryDirectory() as scratch:
        models = quantised_models if args.quantised else random_models
        subjects = list(models(Path(scratch), kernels))
        if args.ranks:
            subjects = [subject for subject in subjects if subject.has_experts]
        bundled = list(bundled_models(Path(scratch), kernels, quantised=args.quantised))
        about = {"weights": "quantised"} if args.quantised else {}
        about |= {"kernels": kernels[0].name, "models": len(subjects) + len(bundled)}
        result = {**about, "seed": args.seed, **check(args, subjects, bundled)}
    print(json.dumps(result))
    save(args.json, result)
    return 1 if result["different"] else 0


def load(
    directory: Path, kernels: list[CpuOps], dtype: torch.dtype = torch.bfloat16
) -> list[Decoder]:
    return [load_decoder(directory, dtype, ops=ops) for ops in kernels]


def caches_of(decoder: Decoder) -> Iterator[torch.dtype | None]:
    """Of CACHES what this model's can be; latents are held as they are computed."""
    for kv_dtype in CACHES:
        specs = decoder.config.caches(decoder.dtype, kv_dtype)
        try:
            block_bytes(specs, decoder.ops, 16)
        except ConfigError:
            continue
        yield kv_dtype


def bundled_models(scratch: Path, kernels: list[CpuOps], *, quantised: bool) -> Iterator[Subject]:
    """The bundled model, or the GGUF files that it is written as."""
    places = {"bundled": Path(moebius.__file__).parent / "bundled"}
    if quantised:
        plain = places.pop("bundled")
        for recipe in RECIPES:
            places[f"bundled, {recipe}"] = scratch / f"bundled-{recipe}.gguf"
            write_model(plain, places[f"bundled, {recipe}"], recipe)
    for name, place in places.items():
        decoders = load(place, kernels)
        for kv_dtype in CACHES:
            yield Subject(name, decoders, place, kv_dtype, ordered=quantised)


def quantised_models(scratch: Path, kernels: list[CpuOps]) -> Iterator[Subject]:
    """Of every type of block and of every kind of directory, in each dtype."""
    as_floats = [CpuOps(threads, activations="float") for threads in (1, 2)]
    ways = {"": kernels, ", activations as they are": as_floats}
    for dtype, (way, ops) in product((torch.bfloat16, torch.float32), ways.items()):
        for blocks in BLOCK_FORMATS:
            decoders = [in_blocks(blocks.name, each, dtype) for each in ops]
            for kv_dtype in CACHES:
                yield Subject(f"{blocks.name}-{dtype}{way}", decoders, None, kv_dtype)
    for (name, kind), model_type in product(KINDS.items(), SIZES):
        directory = scratch / f"{name}-{model_type}"
        sizes = {**SIZES[model_type], "max_position_embeddings": MAX_MODEL_LEN}
        save_tiny(directory, model_type, **sizes)
        write_quantised(directory, kind)
        for dtype in (torch.bfloat16, torch.float32):
            decoders = load(directory, kernels, dtype)
            for kv_dtype in CACHES:
                name_of = f"{directory.name}-{dtype}"
                yield Subject(name_of, decoders, directory, kv_dtype, ordered=True)


def random_models(scratch: Path, kernels: list[CpuOps]) -> Iterator[Subject]:
    """Of every architecture, with windows and without, in each dtype."""
    models = {model_type: (model_type, {}) for model_type in FAMILY} | WINDOWED
    for name, (model_type, changes) in models.items():
        directory = scratch / name
        half = scratch / f"{name}-float16"
        sizes = {"max_position_embeddings": MAX_MODEL_LEN, "vocab_size": 300}
        model = save_tiny(directory, model_type, **sizes, **changes)
        model.half().save_pretrained(half)
        as_stored = load(directory, kernels)
        wide = load(half, kernels, torch.float32)
        for kv_dtype in caches_of(as_stored[0]):
            yield Subject(name, as_stored, directory, kv_dtype)
            yield Subject(half.name, wide, half, kv_dtype)
    for dtype in (torch.bfloat16, torch.float32):
        decoders = [mixed(ops, dtype) for ops in kernels]
        for kv_dtype in CACHES:
            yield Subject(f"mixed-{dtype}", decoders, None, kv_dtype)


def check(
    args: argparse.Namespace, subjects: list[Subject], bundled: list[Subject]
) -> dict[str, object]:
    counts = {"schedules": 0, "answers": 0, "tokens": 0, "preemptions": 0, "prefix_hit_tokens": 0}
    by_ranks: Counter[int] = Counter()
    start = time.monotonic()
    for number in range(args.schedules):
        if args.seconds is not None and time.monotonic() - start > args.seconds:
            break
        rng = random.Random(f"{args.seed}-{number}")
        subject = rng.choice(bundled if number % BUNDLED_EVERY == 0 else subjects)
        some = rng.sample(subject.wishes, rng.choice((1, 2, 4, 8, 16, 32, 64)))
        seen, how, ranks = subject.answers(some, rng, args.ranks)
        by_ranks[ranks] += 1
        for found in seen.rounds:
            for wish in some:
                if found[wish.id] != subject.expected(wish):
                    where = f"schedule {number} of {subject.name}: {wish.id} differs under {how}"
                    return counts | {"different": where}
                counts["answers"] += 1
                counts["tokens"] += len(found[wish.id][0])
        counts["schedules"] += 1
        counts["preemptions"] += seen.preemptions
        counts["prefix_hit_tokens"] += seen.prefix_hits
        if number % 100 == 99:
            print(
                f"{number + 1} schedules, {counts['answers']} answers, "
                f"{time.monotonic() - start:.0f} s",
                flush=True,
            )
    seconds = round(time.monotonic() - start)
    groups = {"ranks": dict(sorted(by_ranks.items()))} if args.ranks else {}
    return counts | groups | {"different": None, "seconds": seconds}


if __name__ == "__main__":
    sys.exit(main())
