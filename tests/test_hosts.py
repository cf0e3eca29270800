"""Hosts serve one model, bit for bit as one process does, and outlive what hosts suffer.

They are network namespaces, with addresses and links; where those cannot be made, two of them are
this host, at its loopback address. `-m hosts` takes more hosts, and minutes.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hosts import Asking, Together, bodies, hosts, wait_until
from moebius.engine import cluster
from moebius.models.hub import resolve_model
from moebius.parallel.key import ClusterKey
from namespaces import INTERFACE, Network, Switched, Where, far_apart, switched, why_not
from serving import serving

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="/proc says who is whose child"),
    pytest.mark.timeout(600),
]
SIZES = ("--kv-cache-memory-bytes", "16777216")
LOST = r"node {} \(.*\) is lost"


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("key") / "key"
    file.write_text(ClusterKey.draw().text)
    file.chmod(0o600)
    return file


@contextmanager
def together(network: Network, model: str, key: Path, *options: str) -> Iterator[Together]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    endpoint = f"{network.addresses[0]}:{port}"
    with hosts(network.hosts, model, endpoint, key, *SIZES, *options) as made:
        yield made


class Load:
    """Requests, and what one process answers."""

    def __init__(self, directory: Path, name: str, count: int, max_tokens: int) -> None:
        self.asked = bodies(name, count, max_tokens)
        with serving(directory, name) as url:
            self.expected: list[Any] = Asking(Where(), url, self.asked).answers()

    def begin(self, group: Together) -> Asking:
        """All are under way."""
        return group.ask(self.asked).wait_for_tokens()


@pytest.fixture(scope="module")
def load(tiny_model: Path) -> Load:
    made = Load(tiny_model, str(tiny_model), count=5, max_tokens=250)
    assert len({each["text"] for each in made.expected}) == 5
    return made


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    if why_not() is None:
        with switched(2) as made:
            yield made
    else:
        yield Network((Where(), Where()), ("127.0.0.1",) * 2)


@pytest.fixture(scope="module")
def pair(network: Network, tiny_model: Path, key: Path) -> Iterator[Together]:
    """Two hosts, a rank each; what one test has lost is back before the next."""
    with together(network, str(tiny_model), key, "--ranks", "2") as made:
        yield made


def others(group: Together, *lost: int) -> list[int]:
    """The ranks' processes on all nodes but these."""
    kept = [node for number, node in enumerate(group.nodes) if number not in lost]
    return [pid for node in kept for pid in node.children]


@contextmanager
def all_answered(group: Together, load: Load, *lost: int) -> Iterator[None]:
    """What the block does to these nodes changes no answer, and no process of the others."""
    group.wait_for_all()
    stay = others(group, *lost)
    asking = load.begin(group)
    yield
    assert asking.answers() == load.expected
    assert others(group, *lost) == stay


def test_two_hosts_answer_as_one_process(pair: Together, load: Load) -> None:
    assert pair.ask(load.asked).answers() == load.expected
    assert all(rank["traffic"]["bytes_out"] > 0 for rank in pair.group()["ranks"])


def test_a_rank_of_the_other_host_is_killed(pair: Together, load: Load) -> None:
    front, node = pair.nodes
    (lost,) = node.children
    stay = others(pair, 1)
    asking = load.begin(pair)
    os.kill(lost, signal.SIGKILL)
    assert asking.answers() == load.expected
    front.wait_for("rank 1 on node 1 .* was ended by SIGKILL")
    pair.wait_for_all()
    assert lost not in node.children and len(node.children) == 1
    assert others(pair, 1) == stay


def test_a_link_is_cut_and_mended(pair: Together, load: Load, network: Network) -> None:
    if not isinstance(network, Switched):
        pytest.skip(str(why_not()))
    front, node = pair.nodes
    stay = others(pair, 1)
    asking = load.begin(pair)
    network.cut(1)
    front.wait_for(LOST.format(1), seconds=15)
    node.wait_for("the front is lost", seconds=15)
    wait_until(lambda: not node.children)
    network.mend(1)
    assert asking.answers() == load.expected
    pair.wait_for_all()
    assert others(pair, 1) == stay


@pytest.mark.hosts
def test_the_other_hosts_command_is_killed_and_started_again(pair: Together, load: Load) -> None:
    """Its ranks end with it."""
    ranks = pair.nodes[1].children
    stay = others(pair, 1)
    asking = load.begin(pair)
    pair.nodes[1].process.kill()
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in ranks))
    pair.start_again(1)
    assert asking.answers() == load.expected
    pair.wait_for_all()
    assert others(pair, 1) == stay


def test_nothing_outlives_a_front_that_is_killed(pair: Together) -> None:
    front, node = pair.nodes
    left = [*front.children, *node.children]
    said = node.said("the front is lost")
    front.process.kill()
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in left))
    node.wait_for("the front is lost", times=said + 1)
    assert node.end() == 0


@contextmanager
def at_a_switch(count: int) -> Iterator[Switched]:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with switched(count) as made:
        yield made


@pytest.mark.hosts
def test_three_hosts_go_on_without_one(tiny_model: Path, key: Path, load: Load) -> None:
    """Ranks have two, one and one of four experts, and two more each: any two have all."""
    options = ("--ranks", "3", "--spare-experts", "2")
    with (
        at_a_switch(3) as network,
        together(network, str(tiny_model), key, *options) as trio,
    ):
        assert trio.ask(load.asked).answers() == load.expected
        for lost in (1, 2):
            stay = others(trio, lost)
            asking = load.begin(trio)
            trio.nodes[lost].kill_host()
            assert asking.answers() == load.expected
            assert trio.ask(load.asked).answers() == load.expected
            assert trio.computing() == [number != lost for number in range(3)]
            trio.start_again(lost)
            trio.wait_for_all()
            assert others(trio, lost) == stay
            assert trio.ask(load.asked).answers() == load.expected

        # The others wait for a front that is started again.
        trio.front.kill_host()
        trio.start_again(0)
        assert trio.ask(load.asked).answers() == load.expected


@pytest.mark.hosts
def test_two_ranks_of_one_host_go_on_without_those_of_the_other(
    tiny_model: Path, key: Path, load: Load
) -> None:
    """A rank's spare expert is one of the other host's."""
    options = ("--ranks", "4", "--spare-experts", "1")
    with (
        at_a_switch(2) as network,
        together(network, str(tiny_model), key, *options) as group,
    ):
        stay = group.front.children
        asking = load.begin(group)
        group.nodes[1].kill_host()
        assert asking.answers() == load.expected
        assert group.computing() == [True, True, False, False]
        group.start_again(1)
        group.wait_for_all()
        assert group.ask(load.asked).answers() == load.expected
        assert group.front.children == stay


@pytest.mark.hosts
def test_four_hosts_outlive_what_happens_to_them(tiny_model: Path, key: Path, load: Load) -> None:
    with (
        at_a_switch(4) as network,
        together(network, str(tiny_model), key, "--ranks", "4") as group,
    ):
        front, _, third, fourth = group.nodes
        with all_answered(group, load, 3):
            os.kill(fourth.children[0], signal.SIGSTOP)

        # A command that is as silent as if its host had stopped; it goes on, and comes back.
        with all_answered(group, load, 2):
            os.kill(third.process.pid, signal.SIGSTOP)
            front.wait_for(LOST.format(2), seconds=15)
            os.kill(third.process.pid, signal.SIGCONT)

        with all_answered(group, load, 1):
            network.unplug(1)
            front.wait_for(LOST.format(1), seconds=15)
            network.plug_in(1)

        # A link that is away for a moment, as long as TCP sends again in time: nobody is lost.
        with all_answered(group, load):
            network.cut(2)
            time.sleep(cluster.SILENCE_SECONDS / 4)
            network.mend(2)

        # The front's own rank.
        with all_answered(group, load, 0):
            os.kill(front.children[0], signal.SIGKILL)

        # Two hosts at once.
        with all_answered(group, load, 1, 3):
            for lost in (1, 3):
                group.nodes[lost].kill_host()
                group.start_again(lost)
        group.wait_for_all()


@pytest.mark.hosts
def test_experts_move_between_hosts(tiny_model: Path, key: Path, load: Load) -> None:
    """Three ranks, two of them on the front's host, until what it has measured moves experts."""
    options = ("--ranks", "3", "--expert-placement", "balanced", "--spare-experts", "1")
    with (
        at_a_switch(2) as network,
        together(network, str(tiny_model), key, *options) as group,
    ):
        for _ in range(60):
            assert group.ask(load.asked).answers() == load.expected
            if group.group()["moves"]:
                break
        assert group.group()["moves"]
        assert group.ask(load.asked).answers() == load.expected


@pytest.mark.hosts
@pytest.mark.timeout(1200)
def test_two_ranks_of_the_bundled_model_here_and_one_there(key: Path) -> None:
    load = Load(resolve_model("bundled"), "bundled", count=4, max_tokens=30)
    options = ("--ranks", "3", "--cluster-interface", INTERFACE, "--rdzv-timeout", "120")
    with at_a_switch(2) as network, together(network, "bundled", key, *options) as group:
        front, node = group.nodes
        stay = front.children
        assert group.ask(load.asked).answers(300) == load.expected
        asking = load.begin(group)
        network.unplug(1)
        front.wait_for(LOST.format(1), seconds=15)
        node.wait_for("the front is lost", seconds=15)
        wait_until(lambda: not node.children)
        network.plug_in(1)
        assert asking.answers(300) == load.expected

        asking = load.begin(group)
        node.kill_host()
        front.wait_for(LOST.format(1), times=2, seconds=15)
        group.start_again(1)
        assert asking.answers(300) == load.expected
        assert front.children == stay
        left = [*front.children, *group.nodes[1].children]
        assert front.end(60) == 0
        assert group.nodes[1].process.wait(10) == 0
        assert not any(Path(f"/proc/{pid}").exists() for pid in left)


@pytest.mark.hosts
def test_a_slow_link(tiny_model: Path, key: Path) -> None:
    """20 ms each way."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    load = Load(tiny_model, str(tiny_model), count=3, max_tokens=15)
    with (
        far_apart(0.02) as network,
        together(network, str(tiny_model), key, "--ranks", "2") as slow,
    ):
        assert slow.ask(load.asked).answers() == load.expected
        asking = load.begin(slow)
        os.kill(slow.nodes[1].children[0], signal.SIGKILL)
        assert asking.answers() == load.expected
