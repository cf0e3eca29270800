"""Experts over several ranks: the bits of one process, on any number of them, however experts are
placed, and while they are moved."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

import rank_steps
from covering import each_value
from moebius.engine.config import EngineConfig
from moebius.engine.expert_share import ExpertShare
from moebius.engine.load import prepare
from moebius.engine.runner import Runner
from moebius.engine.shared_head import SHARED_ROWS
from moebius.errors import ConfigError, PeerError, WeightsError
from moebius.models.decoder import Decoder
from moebius.models.store import Checkpoint, open_checkpoint
from moebius.models.store.load import Loader, load_decoder
from moebius.moe.placement import LayerPlacement, Placement
from moebius.moe.ranks import ExpertRank
from moebius.ops.cpu import CpuOps
from moebius.ops.cpu.experts import CpuExperts
from moebius.ops.interface import Ops
from moebius.ops.reference import ReferenceOps
from moebius.ops.steps import StepInputs
from moebius.parallel.exchange import Epoch, ExchangeSpec
from moebius.parallel.shared_memory import Segment
from ops.levels import bits
from oracle import FAMILY, ONE_OF_EACH_KIND, save_tiny, saved_tiny
from parallel import rank_side
from parallel import ranks as processes
from parallel.rank_side import Meeting
from rank_steps import BLOCK_SIZE, BLOCKS, CPU, MAX_TOKENS, Batches, hidden_bytes, runner
from rank_threads import ThreadExchange, group, together

WITH_EXPERTS = sorted(
    name for name, sizes in FAMILY.items() if any("experts" in key for key in sizes)
)


@dataclass
class Group:
    """The ranks of a model, and beside each a process that has all experts."""

    runners: list[Runner]
    alone: list[Runner]
    exchanges: list[ThreadExchange]
    loaders: list[Loader]
    batches: list[Batches]

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        placement: Placement,
        ops: type[Ops] = CpuOps,
        *,
        near: bool = False,
    ) -> Group:
        made = cls([], [], group(spec_of(checkpoint, dtype, placement.ranks)), [], [])
        for rank, exchange in enumerate(made.exchanges):
            part = ExpertRank(placement, rank, MAX_TOKENS, exchange)
            decoder = Decoder(checkpoint.config, ops(), dtype, "meta", ranks=part)
            loader = Loader(checkpoint, CPU, near=near)
            loader.fill(decoder)
            made.loaders.append(loader)
            made.runners.append(runner(decoder))
            made.alone.append(runner(load_decoder(checkpoint, dtype, ops=ops())))
            made.batches.append(Batches(rank))
        return made

    def step(self, *, empty: Sequence[int] = ()) -> list[Tensor]:
        """A step of all ranks, compared bit for bit with each one's own, alone."""
        steps = [batches.step(empty=rank in empty) for rank, batches in enumerate(self.batches)]
        found = together(
            self.exchanges, lambda rank: self.runners[rank].execute(steps[rank]).clone()
        )
        for step, one, alone in zip(steps, found, self.alone, strict=True):
            exact = alone.execute(step)
            assert len(one) == len(step.input_ids_host)
            assert torch.equal(bits(one), bits(exact))
        self._check_logits(steps)
        return found

    def _check_logits(self, steps: Sequence[StepInputs]) -> None:
        """Of which each rank makes some columns for all; of the last rows first, of each other one."""
        heads = [one.programs.shared for one in self.runners]
        all_there = len(heads) == self.runners[0].model.ranks.received.most // MAX_TOKENS
        assert {each.usable for each in heads if each} == {all_there}
        if not all_there:
            return
        rows = [range(len(step.input_ids_host))[::-2][:SHARED_ROWS] for step in steps]
        found = together(
            self.exchanges, lambda rank: self.runners[rank].logits(rows[rank], True).clone()
        )
        for one, alone, wanted in zip(found, self.alone, rows, strict=True):
            exact = alone.logits(wanted)
            assert one.shape == exact.shape
            assert torch.equal(bits(one), bits(exact))

    def move(self, placement: Placement) -> None:
        for loader, one in zip(self.loaders, self.runners, strict=True):
            loader.move_experts(one.model, loader.bring_experts(one.model, placement))


def spec_of(checkpoint: Checkpoint, dtype: torch.dtype, ranks: int) -> ExchangeSpec:
    config = checkpoint.config
    (top_k,) = {part.router.top_k for part in config.feed_forward if part.router is not None}
    return ExchangeSpec(
        ranks, MAX_TOKENS, config.hidden_size, top_k, dtype, SHARED_ROWS, config.vocab_size
    )


def random_placement(experts: dict[int, int], ranks: int, rng: random.Random) -> Placement:
    """Any one: each rank holds some, each expert has one or more places."""
    layers = {}
    for layer, count in experts.items():
        order = rng.sample(range(count), count)
        held = [[e] for e in order[:ranks]]
        for e in order[ranks:]:
            held[rng.randrange(ranks)].append(e)
        for _ in range(rng.randint(0, 3)):
            held[rng.randrange(ranks)].append(rng.randrange(count))
        layers[layer] = LayerPlacement(count, tuple(map(tuple, held)))
    return Placement(layers)


@pytest.mark.parametrize(
    ("model_type", "ranks"), each_value(WITH_EXPERTS, [3, 2, 4, 1], among=ONE_OF_EACH_KIND)
)
def test_hidden_states_are_those_of_one_process(
    tmp_path: Path, model_type: str, ranks: int
) -> None:
    """Five or six experts, which two and four do not divide: mixed batches, and ranks without
    any."""
    save_tiny(tmp_path, model_type)
    checkpoint = open_checkpoint(tmp_path)
    dtype = (torch.bfloat16, torch.float32)[ranks % 2]
    made = Group.load(checkpoint, dtype, Placement.linear(checkpoint.config.experts, ranks))
    for one in made.runners:
        trace = one.programs.step.trace
        assert trace.reason == ""
        assert trace.segments == 1 + 2 * len(checkpoint.config.experts)
    for _ in range(4):
        made.step()
    made.step(empty=range(1, ranks))
    made.step(empty=range(ranks))
    assert all(each.calls for each in made.exchanges)


@pytest.mark.parametrize(("ranks", "near"), [(2, False), (3, False), (3, True)])
def test_any_placement_gives_the_same_bits_and_experts_move_between_steps(
    tmp_path: Path, ranks: int, near: bool
) -> None:
    """With replicas, which share an expert's rows; of mapped weights, and of copies."""
    save_tiny(tmp_path, "qwen2_moe")
    checkpoint = open_checkpoint(tmp_path)
    experts = checkpoint.config.experts
    rng = random.Random(ranks)
    made = Group.load(checkpoint, torch.bfloat16, Placement.linear(experts, ranks), near=near)
    for _ in range(6):
        made.step()
        before = [one.programs for one in made.runners]
        placement = random_placement(experts, ranks, rng)
        made.move(placement)
        made.step()
        for rank, one in enumerate(made.runners):
            assert one.programs is before[rank]  # which go on with the experts that came
            for layer, placed in placement.layers.items():
                held = one.model.layers[layer].mlp.experts.down_proj.held()
                there = {e for e, weight in enumerate(held) if weight is not None}
                assert there == set(placed.held[rank])


@pytest.mark.parametrize("kind", ["shared", "sockets"])
def test_processes_that_share_experts_give_the_bits_of_one(tmp_path: Path, kind: str) -> None:
    """Three of them, over what they will really use, before and after experts were moved."""
    save_tiny(tmp_path, "qwen2_moe")
    checkpoint = open_checkpoint(tmp_path)
    experts = checkpoint.config.experts
    alone = [runner(load_decoder(tmp_path, torch.bfloat16, ops=CpuOps(1))) for _ in range(3)]
    batches = [Batches(rank) for rank in range(3)]
    spec = spec_of(checkpoint, torch.bfloat16, 3)
    epoch = Epoch("test", 1)
    with Segment(spec, epoch) as segment, processes.ranks(3) as members:
        place = segment.place if kind == "shared" else str(tmp_path / "store")
        processes.together(members, rank_side.join, Meeting(kind, place, spec, epoch))
        first = Placement.linear(experts, 3)
        processes.together(members, rank_steps.load, tmp_path, torch.bfloat16, first)
        for turn in range(4):
            found = processes.together(members, rank_steps.step)
            for rank, one in enumerate(alone):
                assert found[rank] == hidden_bytes(one, batches[rank].step())
            if turn == 1:
                other = random_placement(experts, 3, random.Random(kind))
                processes.together(members, rank_steps.move, other)


@pytest.mark.parametrize("ops", [CpuOps, ReferenceOps], ids=["unrecorded", "reference"])
def test_plain_pytorch_takes_part_too(tmp_path: Path, ops: type[Ops]) -> None:
    """One row in a step, so that torch takes the same way to it wherever it is computed."""
    save_tiny(tmp_path, "mixtral")
    checkpoint = open_checkpoint(tmp_path)
    placement = Placement.linear(checkpoint.config.experts, 2)
    made = Group.load(checkpoint, torch.float32, placement, ops)
    step = StepInputs.build([[7]], [0], [[0]], BLOCK_SIZE)
    found = together(made.exchanges, lambda rank: made.runners[rank].execute(step).clone())
    for rank in range(2):
        torch.testing.assert_close(found[rank], made.alone[rank].execute(step))


def test_programs_are_recorded_anew_where_they_cannot_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CpuExperts, "become", lambda *_: False)
    save_tiny(tmp_path, "mixtral")
    checkpoint = open_checkpoint(tmp_path)
    experts = checkpoint.config.experts
    made = Group.load(checkpoint, torch.bfloat16, Placement.linear(experts, 2))
    before = [one.programs for one in made.runners]
    made.step()
    made.move(random_placement(experts, 2, random.Random(0)))
    made.step()
    assert all(one.programs is not was for one, was in zip(made.runners, before, strict=True))


def test_a_group_goes_on_with_fewer_ranks_and_with_more_again(tmp_path: Path) -> None:
    """One leaves, the others hold all experts between them, and then it is back."""
    save_tiny(tmp_path, "olmoe")
    checkpoint = open_checkpoint(tmp_path)
    experts = checkpoint.config.experts
    made = Group.load(checkpoint, torch.bfloat16, Placement.linear(experts, 3))
    made.step()
    everyone = list(zip(made.loaders, made.runners, made.alone, made.batches, strict=True))
    for members in (everyone[1:], everyone):
        loaders, runners, alone, batches = map(list, zip(*members, strict=True))
        size = len(members)
        exchanges = group(spec_of(checkpoint, torch.bfloat16, size))
        for rank, (loader, one) in enumerate(zip(loaders, runners, strict=True)):
            move = loader.bring_experts(one.model, Placement.linear(experts, size), rank)
            loader.move_experts(one.model, move)
            if size == 2:  # the group that it had joined was another's
                with pytest.raises(PeerError, match="has joined no group yet"):
                    one.execute(StepInputs.build([[7]], [0], [[BLOCKS - 1]], BLOCK_SIZE))
            one.model.ranks.join(exchanges[rank])
        part = Group(runners, alone, exchanges, loaders, batches)
        for _ in range(3):
            part.step()


def test_a_rank_that_fails_ends_the_step_of_the_others(tmp_path: Path) -> None:
    """And what it raised is what is told; the next group's steps are right again."""
    save_tiny(tmp_path, "mixtral")
    checkpoint = open_checkpoint(tmp_path)
    placement = Placement.linear(checkpoint.config.experts, 2)
    made = Group.load(checkpoint, torch.bfloat16, placement)
    made.step()
    one, other = made.runners
    step = StepInputs.build([[7, 8]], [0], [[BLOCKS - 1]], BLOCK_SIZE)

    def act(rank: int) -> Tensor:
        if rank == 1:
            raise RuntimeError("the power is gone")
        return one.execute(step)

    with pytest.raises(RuntimeError, match="the power is gone"):
        together(made.exchanges, act)
    with pytest.raises(PeerError):
        other.execute(step)
    made.exchanges = group(spec_of(checkpoint, torch.bfloat16, 2))
    for rank, each in enumerate(made.runners):
        assert each.model.ranks is not None
        each.model.ranks.join(made.exchanges[rank])
    made.step()


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path, "mixtral")
    checkpoint = open_checkpoint(tmp_path)
    experts = checkpoint.config.experts
    two = Placement.linear(experts, 2)
    part = ExpertRank(two, 0, MAX_TOKENS)
    with pytest.raises(PeerError, match="rank 0 of 2 has joined no group"):
        _ = part.exchange
    with pytest.raises(ConfigError, match="rank 2 is none of the 2"):
        ExpertRank(two, 2, MAX_TOKENS)
    with pytest.raises(ConfigError, match="on 3 ranks, but memory was planned for 2"):
        part.place(Placement.linear(experts, 3), 0)
    for ranks, rank, tokens in ((2, 1, MAX_TOKENS), (3, 0, MAX_TOKENS), (2, 0, MAX_TOKENS - 1)):
        spec = ExchangeSpec(ranks, tokens, checkpoint.config.hidden_size, 2, torch.float32)
        with pytest.raises(ConfigError, match="was to join an exchange that was made for"):
            part.join(group(spec)[rank])
    other = Placement.linear({0: 5, 1: 4}, 2)
    with pytest.raises(ConfigError, match="4 experts are placed for layer 1, which has 5"):
        Decoder(checkpoint.config, CpuOps(1), ranks=ExpertRank(other, 0, MAX_TOKENS))
    with pytest.raises(ConfigError, match="5 experts are placed for layer 1, which has 4"):
        part.place(other, 0)
    assert part.placement is two


def test_a_checkpoint_lacks_nothing_that_is_at_another_rank(tmp_path: Path) -> None:
    """All tensors are checked by name and shape, whoever is to load them: rank 0 has experts 0 to
    2."""
    theirs = saved_tiny(tmp_path, "mixtral")
    state = theirs.state_dict()
    name = next(name for name in state if "experts.gate_up_proj" in name)
    state[name] = state[name][:4].clone()
    theirs.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(
        WeightsError, match=r"layers\.0\.block_sparse_moe\.experts\.4\.w1.* missing"
    ):
        prepare(tmp_path, EngineConfig(), ExpertShare(0, 2))
