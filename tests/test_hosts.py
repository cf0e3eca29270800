"""Two hosts serve one model, bit for bit as one process does, and outlive what hosts suffer.

By default both are this one, at its loopback address. `-m hosts` makes hosts of their own out of
network namespaces, with addresses and a link that can be cut.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hosts import Asking, Where, again, bodies, hosts, wait_until
from moebius.models.hub import resolve_model
from moebius.parallel.key import ClusterKey
from serving import serving

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc says who is whose child")
SIZES = ("--kv-cache-memory-bytes", "16777216")


@pytest.fixture
def key(tmp_path: Path) -> Path:
    file = tmp_path / "key"
    file.write_text(ClusterKey.draw().text)
    file.chmod(0o600)
    return file


def of_one_process(directory: Path, name: str, asked: list[dict[str, Any]]) -> list[Any]:
    with serving(directory, name) as url:
        return Asking(Where(), url, asked).answers()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


@pytest.mark.timeout(600)
def test_two_commands_serve_as_one_process_and_outlive_a_rank(tiny_model: Path, key: Path) -> None:
    name = str(tiny_model)
    asked = bodies(name, count=5, max_tokens=60)
    expected = of_one_process(tiny_model, name, asked)
    assert len({each["text"] for each in expected}) == 5
    endpoint = f"127.0.0.1:{free_port()}"
    with hosts([Where()] * 2, name, endpoint, key, "--ranks", "2", *SIZES) as ((front, node), url):
        assert Asking(Where(), url, asked).answers() == expected
        (lost,) = node.children
        asking = Asking(Where(), url, asked)
        asking.wait_for_tokens()
        os.kill(lost, signal.SIGKILL)
        assert asking.answers() == expected
        front.wait_for("rank 1 on node 1 .* was ended by SIGKILL")
        assert lost not in node.children and len(node.children) == 1
        left = [*front.children, *node.children]
        front.process.kill()
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in left))
        node.wait_for("the front is lost")
        assert node.end() == 0


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=30)


def may_make_hosts() -> bool:
    """Whether network namespaces can be made here."""
    try:
        run("ip", "netns", "add", "moebius-probe")
        run("ip", "netns", "del", "moebius-probe")
    except (OSError, subprocess.SubprocessError):
        return False
    return True


@contextmanager
def namespaces() -> Iterator[tuple[Where, Where]]:
    """Two hosts with a link between them: 10.77.0.1 and 10.77.0.2, interface eth0 at each."""
    names = [f"moebius-{os.getpid()}-{number}" for number in range(2)]
    try:
        for name in names:
            run("ip", "netns", "add", name)
            run("ip", "-n", name, "link", "set", "lo", "up")
        run(
            *("ip", "link", "add", "eth0", "netns", names[0]),
            *("type", "veth", "peer", "name", "eth0", "netns", names[1]),
        )
        for number, name in enumerate(names):
            run("ip", "-n", name, "address", "add", f"10.77.0.{number + 1}/24", "dev", "eth0")
            run("ip", "-n", name, "link", "set", "eth0", "up")
        first, second = (Where(("ip", "netns", "exec", name)) for name in names)
        yield first, second
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.mark.hosts
@pytest.mark.timeout(1200)
def test_hosts_of_their_own(key: Path) -> None:
    """The bundled model on three ranks: two on the front's host, one on the other."""
    if not may_make_hosts():
        pytest.skip("network namespaces cannot be made here")
    directory = resolve_model("bundled")
    asked = bodies("bundled", count=4, max_tokens=30)
    expected = of_one_process(directory, "bundled", asked)
    options = ("--ranks", "3", "--cluster-interface", "eth0", "--rdzv-timeout", "120", *SIZES)
    with (
        namespaces() as wheres,
        hosts(wheres, "bundled", "10.77.0.1:29500", key, *options) as ((front, node), url),
    ):
        here = wheres[0]
        assert Asking(here, url, asked).answers(300) == expected

        # The link is cut under load: each side gives the other up, and they meet again.
        asking = Asking(here, url, asked)
        asking.wait_for_tokens()
        run(*wheres[1].prefix, "ip", "link", "set", "eth0", "down")
        front.wait_for("rank 2 on node 1 .* its host is lost", seconds=15)
        node.wait_for("the front is lost", seconds=15)
        wait_until(lambda: not node.children)
        run(*wheres[1].prefix, "ip", "link", "set", "eth0", "up")
        assert asking.answers(300) == expected
        ranks_here = front.children

        # The host is gone from one moment to the next, and comes back.
        asking = Asking(here, url, asked)
        asking.wait_for_tokens()
        node.kill_host()
        front.wait_for("rank 2 on node 1 .* its host is lost", times=2, seconds=15)
        node = again(node)
        try:
            assert asking.answers(300) == expected
            assert front.children == ranks_here, "no other rank was restarted"
            left = [*front.children, *node.children]
            assert front.end(60) == 0
            assert node.process.wait(10) == 0
            assert not any(Path(f"/proc/{pid}").exists() for pid in left)
        finally:
            node.close()


def delay(where: Where) -> bool:
    """Have what a host sends take 20 ms; False where the kernel cannot."""
    command = ("tc", "qdisc", "add", "dev", "eth0", "root", "netem", "delay", "20ms")
    return subprocess.run([*where.prefix, *command], capture_output=True).returncode == 0


@pytest.mark.hosts
@pytest.mark.timeout(1200)
def test_a_slow_link(key: Path) -> None:
    if not may_make_hosts():
        pytest.skip("network namespaces cannot be made here")
    asked = bodies("bundled", count=3, max_tokens=5)
    with namespaces() as wheres:
        if not all(delay(where) for where in wheres):
            pytest.skip("this kernel cannot delay packets (netem)")
        expected = of_one_process(resolve_model("bundled"), "bundled", asked)
        with hosts(wheres, "bundled", "10.77.0.1:29500", key, "--ranks", "2", *SIZES) as (_, url):
            assert Asking(wheres[0], url, asked).answers(300) == expected
