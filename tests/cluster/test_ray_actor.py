"""A rank's actor without Ray: it comes to its front, and says why where it cannot."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from moebius.cli.hosts import HostOptions
from moebius.cli.ray import invitation as invitation_of
from moebius.cluster import ray_actor
from moebius.cluster.ray_actor import Invitation, RankActor
from moebius.cluster.ray_hosts import ActorCluster
from moebius.engine.cluster import Dismissed, decode_to_host
from moebius.engine.config import EngineConfig
from moebius.engine.hello import host_hello
from moebius.errors import ConfigError, EngineError, MoebiusError
from moebius.models.hub import find_model
from moebius.parallel.key import ClusterKey
from moebius.parallel.meet import Listener
from tiny import write_tokenizer

KEY = ClusterKey.draw()
NAME = socket.gethostname()


@pytest.fixture(autouse=True)
def _placed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_actor, "_whereabouts", lambda: ("Ray node 0123abcd", "127.0.0.1"))


@contextmanager
def front(
    model: Path, patience: float = 20.0, tokenizer: Path | None = None
) -> Iterator[tuple[ActorCluster, Invitation]]:
    config = EngineConfig(ranks=1, threads=1)
    own = host_hello(model, config, node=0, nodes=2, address="127.0.0.1", tokenizer=tokenizer)
    listener = Listener.tcp("127.0.0.1", 0, KEY)
    cluster = ActorCluster(listener, own, patience, lambda rank: "nothing is known")
    try:
        yield (
            cluster,
            Invitation(
                front=cluster.address,
                node=1,
                nodes=2,
                model=str(model),
                config=config,
                interface=None,
                patience=patience,
                log_level="error",
            ),
        )
    finally:
        cluster.close()


def outcome(actor: RankActor) -> MoebiusError | None:
    told = decode_to_host(actor.outcome())
    assert isinstance(told, Dismissed)
    return told.error


def test_it_comes_says_where_it_is_and_is_dismissed(tiny_model: Path) -> None:
    with front(tiny_model) as (cluster, invitation):
        actor = RankActor(invitation.encode(), KEY.text)
        own, other = cluster.assemble()
        assert other.title == f"Ray node 0123abcd ({NAME})"
        assert (other.address, other.directory) == ("127.0.0.1", str(tiny_model))
        assert other.weights == own.weights and other.machine == own.machine
        cluster.close(EngineError("the front fails"))
        assert str(outcome(actor)) == "the front fails"


def test_another_tokenizer_is_the_one_that_grammars_are_matched_by(
    tiny_model: Path, tmp_path: Path
) -> None:
    write_tokenizer(tmp_path, 300)
    with front(tiny_model, tokenizer=tmp_path) as (cluster, invitation):
        other = structs.replace(invitation, tokenizer=str(tmp_path))
        RankActor(other.encode(), KEY.text)
        _, host = cluster.assemble()
        assert host.tokenizer == str(tmp_path)
        lacks = structs.replace(invitation, tokenizer="/no/such/tokenizer")
        error = outcome(RankActor(lacks.encode(), KEY.text))
        assert "there is no directory /no/such/tokenizer" in str(error)


def test_ranks_are_asked_for_with_the_tokenizer_that_the_front_has(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tokenizer(tmp_path, 300)
    monkeypatch.chdir(tmp_path.parent)
    own = host_hello(tiny_model, EngineConfig(ranks=2), node=0, nodes=3, address="127.0.0.1")
    for named, wanted in ((tmp_path.name, str(tmp_path)), ("bundled", "bundled"), (None, None)):
        model = find_model(str(tiny_model), tokenizer=named)
        asked = invitation_of(1, ("127.0.0.1", 1), own, model, HostOptions())
        assert (asked.model, asked.tokenizer, asked.node) == (str(tiny_model), wanted, 2)


def test_what_its_node_lacks_is_said_with_its_name(tiny_model: Path) -> None:
    with front(tiny_model) as (_, invitation):
        lacks = structs.replace(invitation, model="/no/such/model")
        error = outcome(RankActor(lacks.encode(), KEY.text))
        assert isinstance(error, ConfigError)
        assert str(error).startswith(f"Ray node 0123abcd ({NAME}): there is no directory /no/such")
        wrong = structs.replace(invitation, interface="no-such-one")
        error = outcome(RankActor(wrong.encode(), KEY.text))
        assert "--cluster-interface is 'no-such-one'" in str(error)


def test_another_model_on_its_node_ends_both(tiny_model: Path, tmp_path: Path) -> None:
    for file in tiny_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = bytearray((tmp_path / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(weights)
    with front(tiny_model) as (cluster, invitation):
        other = structs.replace(invitation, model=str(tmp_path))
        actor = RankActor(other.encode(), KEY.text)
        with pytest.raises(ConfigError, match=r"Ray node 0123abcd .* has another model in"):
            cluster.assemble()
        assert "has another model in" in str(outcome(actor))


def test_another_tokenizer_on_its_node_ends_both(tiny_model: Path, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, 299)
    with front(tiny_model) as (cluster, invitation):
        other = structs.replace(invitation, tokenizer=str(tmp_path))
        actor = RankActor(other.encode(), KEY.text)
        wanted = rf"0123abcd .* has another tokenizer in {tmp_path} than .* in {tiny_model}: it is"
        with pytest.raises(ConfigError, match=wanted):
            cluster.assemble()
        assert "has another tokenizer in" in str(outcome(actor))


@pytest.mark.parametrize("frame", [b"", b"\x01\x90", b"\xff"])
def test_a_front_of_another_release_is_named(frame: bytes) -> None:
    error = outcome(RankActor(frame, KEY.text))
    assert isinstance(error, ConfigError)
    assert f"Ray node 0123abcd ({NAME}) has another Moebius than the front" in str(error)


def test_what_nobody_foresaw_is_told_too(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(invitation: Invitation) -> Any:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(ray_actor, "hello", fails)
    with front(tiny_model) as (_, invitation):
        error = outcome(RankActor(invitation.encode(), KEY.text))
    assert isinstance(error, EngineError) and "ZeroDivisionError" in str(error)


def test_an_invitation_comes_back_as_what_it_was(tiny_model: Path) -> None:
    with front(tiny_model) as (_, invitation):
        config = replace(invitation.config, ranks=2, expert_placement="balanced")
        sent = structs.replace(invitation, config=config, interface="eth0")
        assert KEY.text not in repr(sent) and KEY.text.encode() not in sent.encode()
        assert ray_actor.wire.unframed(sent.encode(), ray_actor._INVITATION) == sent
