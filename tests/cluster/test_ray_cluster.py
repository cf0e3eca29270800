"""What the front asks of Ray, and makes of its answers. `-m ray` asks Ray itself."""

from __future__ import annotations

import queue
import signal
import socket
import sys
from collections.abc import Iterator

import pytest

from cluster.fake_ray import AuthenticationError, FakeRay, RayError
from moebius.cluster import ray_cluster
from moebius.cluster.ray_cluster import RayCluster, threads_each
from moebius.engine.cluster import Dismissed, encode
from moebius.errors import ConfigError, MoebiusError


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    monkeypatch.setattr(ray_cluster, "check_authenticated", lambda address, allowed: None)
    monkeypatch.setattr(ray_cluster, "_PAUSE_SECONDS", 0.01)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return FakeRay(monkeypatch)


@pytest.fixture
def joined(fake: FakeRay) -> Iterator[RayCluster]:
    cluster = RayCluster()
    yield cluster
    cluster.close()


@pytest.mark.parametrize(
    ("cpus", "ranks", "threads"),
    [
        ([16], 1, 16),
        ([16], 3, 5),
        ([16, 16], 2, 16),
        ([16, 16], 3, 8),
        ([16, 4], 2, 8),
        ([4, 4, 4], 4, 2),
        ([2], 4, 1),
        ([0, 1], 1, 1),
        ([], 2, 1),
    ],
)
def test_ranks_get_the_most_threads_that_all_can_have(
    cpus: list[int], ranks: int, threads: int
) -> None:
    assert threads_each(cpus, ranks) == threads


def test_ray_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'moebius\[ray\]'"):
        RayCluster()


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (AuthenticationError("pages"), "RAY_AUTH_TOKEN"),
        (
            caused(ConnectionError("Failed"), RuntimeError("ray.exceptions.AuthenticationError")),
            "RAY_AUTH_TOKEN",
        ),
        (caused(ConnectionError("Failed to connect"), AuthenticationError("")), "RAY_AUTH_TOKEN"),
        (
            ConnectionError("Could not find any running Ray instance."),
            "Could not find any running Ray instance; run",
        ),
        (
            RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.1\n"),
            "Version mismatch: The cluster was started with: Ray: 2.1",
        ),
        (ValueError("Invalid address format: x"), "Invalid address format: x"),
        (RayError(""), "RayError"),
    ],
)
def test_a_cluster_that_is_not_to_be_had_is_one_line(
    fake: FakeRay, error: Exception, line: str
) -> None:
    fake.fails = error
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ConfigError) as found:
        RayCluster()
    assert line in str(found.value) and "\n" not in str(found.value)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("address", ["junk", "local", "ray://127.0.0.1:10001", "127.0.0.1:0"])
def test_an_address_of_no_cluster_is_named(
    fake: FakeRay, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigError, match=r"RAY_ADDRESS is '.*HOST:PORT"):
        RayCluster()
    assert not fake.open


def test_an_address_where_nobody_listens_is_refused_at_once(
    fake: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        address = f"127.0.0.1:{sock.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        RayCluster().close()
    with pytest.raises(ConfigError, match=f"at RAY_ADDRESS, {address}: Connection refused"):
        RayCluster()


def test_a_cluster_that_does_not_answer_is_given_up(
    fake: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_cluster, "_CONNECT_SECONDS", 0.05)
    fake.silence.clear()
    with pytest.raises(ConfigError, match=r"does not answer within 0\.05 s"):
        RayCluster()
    fake.silence.set()


def test_a_cluster_that_is_not_to_be_trusted_is_left(
    fake: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def refuse(address: str, allowed: bool) -> None:
        asked.append((address, allowed))
        raise ConfigError("anybody can come")

    monkeypatch.setattr(ray_cluster, "check_authenticated", refuse)
    with pytest.raises(ConfigError, match="anybody can come"):
        RayCluster(allow_unauthenticated=True)
    assert asked == [("10.0.0.1:6379", True)]
    assert not fake.open


def test_room_is_set_aside_for_each_rank_and_given_back(fake: FakeRay) -> None:
    before = signal.getsignal(signal.SIGTERM)
    cluster = RayCluster()
    assert signal.getsignal(signal.SIGTERM) == before
    assert fake.given["address"] == "auto", "none is ever started"
    assert cluster.cpus() == [4, 2] and cluster.own_address == "10.0.0.1"
    assert cluster.own_name == "Ray node 0123abcd"
    cluster.place(3, 2, 1, 20.0)
    (group,) = fake.groups
    assert group.bundles == [{"CPU": 2, "GPU": 1}] * 3 and group.strategy == "PACK"
    cluster.close()
    assert group.removed and not fake.open
    cluster.close()


def test_no_room_is_one_line_with_what_there_is(fake: FakeRay, joined: RayCluster) -> None:
    fake.fits = False
    with pytest.raises(ConfigError) as found:
        joined.place(4, 2, 0, 20.0)
    assert str(found.value) == (
        "the Ray cluster has no room for 4 ranks of 2 CPUs (--ranks, --threads) within 20 s "
        "(--rdzv-timeout); its nodes have 4 CPUs at 10.0.0.1, 2 CPUs at 10.0.0.2"
    )
    assert fake.groups[0].waited == pytest.approx(20.0)


def test_an_actor_a_rank_is_restarted_by_ray_for_ever(fake: FakeRay, joined: RayCluster) -> None:
    joined.place(2, 3, 0, 20.0)
    joined.start([b"first", b"second"], "key", lambda error: None)
    assert [actor.arguments for actor in fake.actors] == [(b"first", "key"), (b"second", "key")]
    for rank, actor in enumerate(fake.actors):
        assert actor.options["max_restarts"] == actor.options["max_task_retries"] == -1
        assert actor.options["scheduling_strategy"] == (fake.groups[0], rank)
        assert (actor.options["num_cpus"], actor.options["num_gpus"]) == (3, 0)


def test_what_ends_actors_is_told(fake: FakeRay, joined: RayCluster) -> None:
    told: queue.Queue[MoebiusError] = queue.Queue()
    joined.place(3, 1, 0, 20.0)
    joined.start([b"", b"", b""], "key", told.put)
    first, second, third = fake.actors
    for actor in fake.actors:
        assert actor.asked.acquire(timeout=10)
    first.outcomes[0].end(encode(Dismissed()))
    second.outcomes[0].end(encode(Dismissed(ConfigError("no such model there"))))
    error = told.get(timeout=10)
    assert isinstance(error, ConfigError) and str(error) == "no such model there"
    assert second.asked.acquire(timeout=10), "the next one is listened to"
    assert fake.killed == [(second, False)], "Ray is to start it again"
    assert joined.why_absent(1) == "no such model there"
    third.outcomes[0].end(RayError("The actor died.\n\nModuleNotFoundError: moebius"))
    error = told.get(timeout=10)
    assert isinstance(error, ConfigError)
    assert "The actor died. ModuleNotFoundError: moebius" in str(error)
    second.outcomes[1].end(encode(Dismissed()))
    assert told.empty() and len(fake.killed) == 1


def test_an_absent_actor_is_explained(fake: FakeRay, joined: RayCluster) -> None:
    joined.place(2, 1, 1, 20.0)
    fake.state = "RESCHEDULING"
    assert joined.why_absent(0) == (
        "Ray finds no room for 2 ranks of 1 CPU and 1 GPU; its nodes have 4 CPUs at 10.0.0.1, 2 "
        "CPUs at 10.0.0.2"
    )
    fake.state = "CREATED"
    assert "Ray keeps a place for it" in joined.why_absent(0)
