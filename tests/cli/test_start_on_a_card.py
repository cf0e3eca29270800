"""What fails on a CUDA device at start is one line on stderr and exit code 2, before a port opens.

Every run has one start that fails in each place: no device, a number, a loading engine, training.
What plans and kernels say of a card is in engine/test_plan_for_a_card.py and ops/test_select_cuda.py.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moebius.cli.main import main

pytest.importorskip("triton")

HERE = Path(__file__).parent
GIB = 2**30
# Much more than the model needs: only what is written there does not fit.
CARD = {"free": GIB, "total": 2 * GIB, "capability": [8, 0]}
TOO_OLD = (
    "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU "
    "driver by downloading and installing a new version"
)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


class Starts:
    """Commands on machines with such a card, one after the other: with_card/in_turn.py."""

    def __init__(self, scratch: Path) -> None:
        path = [str(HERE / "with_card"), os.environ.get("PYTHONPATH", "")]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(path), "MOEBIUS_TEST_CARD": "{}"}
        env.pop("TRITON_INTERPRET", None)
        self._stderr = scratch / "stderr"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "in_turn"],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def ended(
        self, command: list[str], card: dict[str, Any], port: int, **variables: str
    ) -> tuple[int, list[str]]:
        """The exit code and the lines of stderr of a command; meanwhile nobody ever listens at the
        port."""
        asked = {"arguments": command, "card": card, "variables": variables}
        told, answer = self._process.stdin, self._process.stdout
        assert told is not None and answer is not None
        told.write(json.dumps(asked | {"stderr": str(self._stderr)}) + "\n")
        told.flush()
        deadline = time.monotonic() + 120
        while not select.select([answer], [], [], 0.02)[0]:
            assert not answers(port), "a port is open before the start has succeeded"
            assert time.monotonic() < deadline, "it did not end"
        return int(answer.readline()), self._stderr.read_text().splitlines()

    def close(self) -> None:
        """With what it has forked, should that not have ended."""
        os.killpg(self._process.pid, signal.SIGKILL)
        with self._process:
            pass


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Starts]:
    made = Starts(tmp_path_factory.mktemp("starts"))
    yield made
    made.close()


def served(
    starts: Starts, model: Path, card: dict[str, Any], *options: str
) -> tuple[int, str, list[str]]:
    """Exit code, the last line of stderr, and those before."""
    port = free_port()
    command = ["serve", str(model), "--port", str(port), "--device", "cuda", *options]
    code, lines = starts.ended(command, card, port)
    assert not any("Traceback" in line for line in lines), lines
    assert [line for line in lines if line.startswith("moebius: ")] == lines[-1:], lines
    return code, lines[-1], lines[:-1]


def test_no_device(tiny_model: Path) -> None:
    """As this machine is, unless it has one: then all of them are hidden."""
    done = subprocess.run(
        [sys.executable, "-m", "moebius", "serve", str(tiny_model), "--device", "cuda"],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    said = done.stderr.splitlines()[-1]
    assert said.startswith("moebius: --device cuda: torch finds no CUDA device (")


@pytest.mark.exhaustive
def test_a_driver_that_is_too_old(starts: Starts, tiny_model: Path) -> None:
    code, said, _ = served(starts, tiny_model, {**CARD, "driver": TOO_OLD})
    assert code == 2
    assert "is too old (found version 11040)" in said and "--device cpu" in said
    assert "Please" not in said


@pytest.mark.exhaustive
def test_too_little_memory_for_the_plan(starts: Starts, tiny_model: Path) -> None:
    code, said, _ = served(starts, tiny_model, {**CARD, "free": 2**16})
    assert code == 2
    assert "64.0 KiB" in said and "the device's 2.0 GiB" in said


@pytest.mark.exhaustive
def test_a_cache_that_is_asked_for_and_too_large(starts: Starts, tiny_model: Path) -> None:
    code, said, _ = served(starts, tiny_model, CARD, "--kv-cache-memory-bytes", str(4 * GIB))
    assert code == 2
    assert "4.0 GiB" in said and "1.0 GiB" in said


def test_memory_that_ends_while_the_model_is_loaded(starts: Starts, tiny_model: Path) -> None:
    """By then the plan has fitted; nothing could be proven either, and the log says so."""
    code, said, before = served(starts, tiny_model, CARD, "--kv-cache-memory-bytes", "4000000")
    assert code == 2
    assert said.startswith(
        "moebius: the device's memory is too small while the model is loaded (CUDA out of memory; "
        "1.0 GiB of 2.0 GiB are free): weights take "
    )
    assert "the KV cache 3.8 MiB" in said
    assert any("too little memory to prove them, 1.0 GiB are left" in line for line in before)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"triton": "3.1.0"}, "triton 3.1.0 is too old; pip install 'triton>=3.6'"),
        ({"triton": None}, "triton is not installed; pip install 'triton>=3.6'"),
    ],
    ids=["triton too old", "no triton"],
)
def test_what_kernels_lack_is_said_before_the_port_opens(
    starts: Starts, tiny_model: Path, changed: dict[str, Any], why: str
) -> None:
    """It is no failure: plain PyTorch serves. Here the start ends for another reason."""
    code, _, before = served(
        starts, tiny_model, CARD | changed, "--kv-cache-memory-bytes", "4000000"
    )
    assert code == 2
    assert len([line for line in before if why in line and "plain PyTorch serves" in line]) == 1


def test_a_device_by_a_number_is_no_device(
    starts: Starts,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With a card and, here, without one. Devices are chosen by CUDA_VISIBLE_DEVICES; more ranks than there are, are refused."""
    port = free_port()
    command = ["serve", str(tiny_model), "--port", str(port), "--device", "cuda:7"]
    code, lines = starts.ended(command, CARD, port)
    assert code == 2
    assert "cuda:7" in "\n".join(lines) and "Traceback" not in "\n".join(lines)
    monkeypatch.setattr(sys, "argv", ["moebius", *command])
    with pytest.raises(SystemExit, match="2"):
        main()
    told = capsys.readouterr().err
    assert "cuda:7" in told and "Traceback" not in told


@pytest.mark.exhaustive
def test_more_ranks_than_devices(starts: Starts, tiny_model: Path) -> None:
    code, said, _ = served(starts, tiny_model, CARD, "--ranks", "2")
    assert code == 2
    assert "--ranks 2: each has a GPU of its own, and this host has 1" in said


def test_training_that_finds_no_room(starts: Starts, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Line {n} of some text.\n" for n in range(2000)))
    recipe = (HERE.parents[1] / "recipes" / "tiny.toml").read_text()
    files = f'[corpus.files]\ntext = "{text}"\n[tokenizer]\nvocab_size = 300\n'
    start, rest = recipe.index("[corpus"), recipe.index("[model]")
    (tmp_path / "recipe.toml").write_text(recipe[:start] + files + recipe[rest:])
    out = str(tmp_path / "out")
    command = ["train", str(tmp_path / "recipe.toml"), "--out", out, "--device", "cuda"]
    code, lines = starts.ended(command, CARD, free_port())
    assert code == 2 and lines[-1].startswith(
        "moebius: the model: the device's memory is too small (CUDA out of memory; 1.00 GiB of "
        "2.00 GiB are free); weights, gradients and optimiser take 0."
    )
    assert not any("Traceback" in line for line in lines)


@pytest.mark.parametrize("driver", [None, TOO_OLD], ids=["no such device", "driver too old"])
def test_training_ends_so_too(starts: Starts, driver: str | None, tmp_path: Path) -> None:
    """A rank whose number has no device; a driver that does not start."""
    card = CARD | ({} if driver is None else {"driver": driver})
    command = ["train", "recipes/tiny.toml", "--out", str(tmp_path / "out"), "--device", "cuda"]
    code, lines = starts.ended(command, card, free_port(), LOCAL_RANK="1")
    said = "moebius: rank 0 is number 1 on " if driver is None else "moebius: --device cuda: torch"
    assert code == 2 and len(lines) == 1 and lines[0].startswith(said)
    assert ("has 1 CUDA device" if driver is None else "found version 11040") in lines[0]
    assert not (tmp_path / "out").exists()
