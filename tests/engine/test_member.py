"""What a rank does when its front forms epochs of fewer ranks than its group has, and of all."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moebius.engine import wire
from moebius.engine.member import TCP, Member
from moebius.parallel.alone import Alone
from moebius.parallel.exchange import Epoch, ExchangeSpec

SPEC = ExchangeSpec(size=3, tokens=4, hidden=8, top_k=1, dtype=torch.float32)


class Connected(Alone):
    def __init__(self, spec: ExchangeSpec, rank: int, epoch: Epoch) -> None:
        super().__init__(spec, rank)
        self.epoch = epoch
        self.given_up: list[int] = []

    def give_up(self, ranks: Sequence[int]) -> None:
        self.given_up += ranks


class Engine:
    """Takes whatever it is told, at once."""

    def __init__(self) -> None:
        self.moves = SimpleNamespace(set=lambda *told: None)
        self.exchanges: list[Connected] = []

    def leave(self) -> None:
        pass

    def join(self, exchange: Connected, heard: int) -> None:
        self.exchanges.append(exchange)


def test_an_epoch_of_survivors_ends_for_them_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks are numbered within an epoch: the two of the first one are 0 and 1."""

    def connected(self: Member, meeting: Any, spec: ExchangeSpec, asked: wire.Join) -> Connected:
        return Connected(spec, asked.rank, meeting.epoch)

    monkeypatch.setattr(Member, "_connected", connected)
    engine: Any = Engine()
    said: list[wire.FromEngine] = []
    member = Member(engine, SPEC, said.append)
    for epoch, ranks in ((1, 2), (2, 3)):
        held = {0: tuple((rank,) for rank in range(ranks))}
        place = TCP + "127.0.0.1"
        join = wire.Join("group", epoch, 1, held, 1, place, timeout=5.0, heard=0)
        member.expect(join)
        member.take(join)
        assert said[-1] == wire.Joined(epoch)
    first, second = engine.exchanges
    assert (first.size, first.given_up) == (2, [0, 1])
    assert (second.size, second.given_up) == (3, [])
