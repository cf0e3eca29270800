"""Steps of a decoder at one of several ranks, whose experts may be at others."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

from moebius.engine.kv_cache import KVCache
from moebius.engine.runner import Runner
from moebius.engine.workspace import StepRows
from moebius.models.decoder import Decoder
from moebius.models.store import open_checkpoint
from moebius.models.store.load import Loader
from moebius.moe.placement import Placement
from moebius.moe.ranks import ExpertRank
from moebius.ops.cpu import CpuOps
from moebius.ops.steps import StateInputs, StepInputs
from ops.levels import bits

MAX_TOKENS = 24
BLOCK_SIZE = 4
BLOCKS = 161  # one more than batches have
CPU = torch.device("cpu")


def runner(decoder: Decoder) -> Runner:
    specs = decoder.config.caches(decoder.dtype)
    cache = KVCache(
        specs, decoder.ops, num_blocks=BLOCKS, block_size=BLOCK_SIZE, device=CPU, num_states=4
    )
    return Runner(decoder, cache, CPU, StepRows(MAX_TOKENS, MAX_TOKENS))


class Batches:
    """Steps of four sequences at one rank; sequence s has blocks 10 s to 10 s + 9, and as many 40
    further on for each of three more groups of layers; and slot s."""

    def __init__(self, seed: object) -> None:
        self._rng = random.Random(repr(seed))
        self._computed = [0] * 4

    def step(self, *, empty: bool = False) -> StepInputs:
        """A prompt's chunk, a decoding token or nothing, of each."""
        rng = self._rng
        some = [s for s in range(4) if rng.random() < 0.7 and not empty]
        counts = [rng.choice((1, rng.randint(1, MAX_TOKENS // 4))) for _ in some]
        starts = []
        for s, count in zip(some, counts, strict=True):
            if self._computed[s] + count > 10 * BLOCK_SIZE:
                self._computed[s] = 0  # another sequence
            starts.append(self._computed[s])
            self._computed[s] += count
        ids = [[rng.randrange(64) for _ in range(count)] for count in counts]
        blocks = [range(10 * s, 10 * s + -(-self._computed[s] // BLOCK_SIZE)) for s in some]
        others = [[[more + block for block in table] for table in blocks] for more in (40, 80, 120)]
        begun = [s for s, start in zip(some, starts, strict=True) if not start]
        states = StateInputs(some, begun, (), ())
        return StepInputs.build(ids, starts, blocks, BLOCK_SIZE, others=others, states=states)


def load(held: dict[str, Any], directory: Path, dtype: torch.dtype, placement: Placement) -> None:
    """In a rank's process, which has joined an exchange: its model, and its batches."""
    checkpoint = open_checkpoint(directory)
    part = ExpertRank(placement, held["rank"], MAX_TOKENS, held["exchange"])
    decoder = Decoder(checkpoint.config, CpuOps(1), dtype, "meta", ranks=part)
    held["loader"] = Loader(checkpoint, CPU)
    held["loader"].fill(decoder)
    held["runner"] = runner(decoder)
    held["batches"] = Batches(held["rank"])


def move(held: dict[str, Any], placement: Placement) -> None:
    loader = held["loader"]
    model = held["runner"].model
    loader.move_experts(model, loader.bring_experts(model, placement))


def step(held: dict[str, Any], *, empty: bool = False) -> bytes:
    """The bits of a step's hidden states."""
    return hidden_bytes(held["runner"], held["batches"].step(empty=empty))


def hidden_bytes(one: Runner, inputs: StepInputs) -> bytes:
    return bits(one.execute(inputs)).numpy().tobytes()
