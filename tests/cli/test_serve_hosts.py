"""moebius serve on several hosts: what is asked wrongly is one line, and exit code 2."""

from __future__ import annotations

import socket
import sys
import threading
from pathlib import Path

import pytest

from moebius.cli.main import main
from moebius.errors import DeadlineError
from moebius.parallel.key import ClusterKey
from moebius.parallel.meet import Listener

KEY = ClusterKey.draw()


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEBIUS_CLUSTER_KEY", KEY.text)


class Refused:
    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: Path
    ) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys
        self._model = str(model)

    def __call__(self, *options: str) -> str:
        """The last line on stderr of a command that ends with 2."""
        command = ["moebius", "serve", self._model, "--port", "0", *options]
        self._monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as end:
            main()
        out, err = self._capsys.readouterr()
        assert end.value.code == 2 and out == "", err
        last = err.splitlines()[-1]
        assert last.startswith("moebius: "), err
        return str(last)


@pytest.fixture
def refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_model: Path
) -> Refused:
    return Refused(monkeypatch, capsys, tiny_model)


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def test_options_that_do_not_go_together(refused: Refused, port: int) -> None:
    at = ("--rdzv-endpoint", f"127.0.0.1:{port}")
    assert "--nnodes is 0" in refused("--nnodes", "0")
    assert "--rdzv-endpoint is for several hosts: give --nnodes" in refused(*at)
    assert "--node-rank is 1; with --nnodes 1" in refused("--node-rank", "1")
    assert "--node-rank is -1" in refused("--nnodes", "2", "--node-rank", "-1", *at)
    assert "needs --rdzv-endpoint HOST:PORT" in refused("--nnodes", "2", "--ranks", "2")
    assert "--nnodes 3 is more than --ranks 2" in refused("--nnodes", "3", "--ranks", "2", *at)
    two = ("--nnodes", "2", "--ranks", "2")
    assert "must be HOST:PORT" in refused(*two, "--rdzv-endpoint", "127.0.0.1")
    assert "isa is 'avx9'" in refused("--isa", "avx9")
    assert "rdzv_timeout" in refused(*two, *at, "--rdzv-timeout", "nan")
    other = refused(*two, *at, "--node-rank", "1", "--cluster-interface", "no-such-one")
    assert "--cluster-interface is 'no-such-one'" in other


def test_a_key_is_needed(
    refused: Refused, port: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    two = ("--nnodes", "2", "--ranks", "2", "--rdzv-endpoint", f"127.0.0.1:{port}")
    missing = str(tmp_path / "none")
    assert f"cluster key file {missing}" in refused(*two, "--cluster-key-file", missing)
    monkeypatch.delenv("MOEBIUS_CLUSTER_KEY")
    for node in ("0", "1"):
        assert "`moebius cluster key` makes one" in refused(*two, "--node-rank", node)


def test_a_port_that_is_taken(refused: Refused) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        at = f"127.0.0.1:{sock.getsockname()[1]}"
        line = refused("--nnodes", "2", "--ranks", "2", "--rdzv-endpoint", at)
    assert line.endswith(
        f"cannot listen on {at} for the cluster: Address already in use; it must be a free port at "
        "an address of this host"
    )


def test_more_ranks_than_experts_start_no_processes(
    refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many they are, and before torch is imported in each of them."""

    def start() -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr("moebius.cluster.engines.EngineProcess", start)
    assert "99 ranks cannot share the 4 experts of a layer" in refused("--ranks", "99")


def test_more_ranks_than_experts_are_refused_where_there_is_no_front(
    refused: Refused, port: int
) -> None:
    """By each host for itself, and at once."""
    two = ("--nnodes", "2", "--node-rank", "1", "--rdzv-endpoint", f"127.0.0.1:{port}")
    line = refused("--ranks", "5", *two, "--rdzv-timeout", "600")
    assert "5 ranks cannot share the 4 experts of a layer; use 1 to 4 ranks" in line


def test_no_front_at_the_address(refused: Refused, port: int) -> None:
    two = ("--nnodes", "2", "--ranks", "2", "--rdzv-endpoint", f"127.0.0.1:{port}")
    line = refused(*two, "--node-rank", "1", "--rdzv-timeout", "0.1")
    assert f"node 1 ({socket.gethostname()}): no front within 0.1 s" in line
    assert line.endswith(f"cannot connect to 127.0.0.1:{port}: Connection refused")


def refuse_all(listener: Listener, done: threading.Event) -> None:
    while not done.is_set():
        with pytest.raises(DeadlineError):
            listener.accept(0.1)


def test_a_front_with_another_key(refused: Refused) -> None:
    listener = Listener.tcp("127.0.0.1", 0, ClusterKey.draw())
    done = threading.Event()
    thread = threading.Thread(target=refuse_all, args=(listener, done))
    thread.start()
    assert not isinstance(listener.address, Path)
    two = ("--nnodes", "2", "--ranks", "2", "--rdzv-endpoint", f"127.0.0.1:{listener.address[1]}")
    line = refused(*two, "--node-rank", "1", "--rdzv-timeout", "15")
    assert f"node 1 ({socket.gethostname()}): " in line and "another cluster key" in line
    done.set()
    thread.join()
    listener.close()


def test_a_host_that_does_not_come(refused: Refused, port: int) -> None:
    two = ("--nnodes", "2", "--ranks", "2", "--rdzv-endpoint", f"127.0.0.1:{port}")
    line = refused(*two, "--rdzv-timeout", "0.2")
    assert "node 1 of 2 did not come" in line and f"127.0.0.1:{port}" in line
    with socket.create_server(("127.0.0.1", port)):
        pass  # nothing listens there any more
