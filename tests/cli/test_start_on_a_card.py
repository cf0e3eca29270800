"""What fails on a CUDA device at start is one line on stderr and exit code 2, before a port opens."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

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


def ended(
    command: list[str], card: dict[str, Any] | None, port: int, **variables: str
) -> tuple[int, list[str]]:
    """The exit code and the lines of stderr of a command on such a machine; meanwhile nobody ever
    listens at the port. None: this machine, whose torch knows no CUDA or finds no device."""
    path = [str(HERE / "with_card")] if card is not None else []
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([*path, os.environ.get("PYTHONPATH", "")]),
        "MOEBIUS_TEST_CARD": json.dumps(card),
        **variables,
    }
    env.pop("TRITON_INTERPRET", None)
    process = subprocess.Popen(
        [sys.executable, "-m", "moebius", *command],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        deadline = time.monotonic() + 120
        while process.poll() is None:
            assert not answers(port), "a port is open before the start has succeeded"
            if time.monotonic() > deadline:
                process.kill()
                raise AssertionError("it did not end")
            time.sleep(0.02)
        assert process.stderr is not None
        return process.returncode, process.stderr.read().splitlines()


def served(
    model: Path, card: dict[str, Any] | None, *options: str, **variables: str
) -> tuple[int, str, list[str]]:
    """Exit code, the last line of stderr, and those before."""
    port = free_port()
    command = ["serve", str(model), "--port", str(port), "--device", "cuda", *options]
    code, lines = ended(command, card, port, **variables)
    assert not any("Traceback" in line for line in lines), lines
    assert [line for line in lines if line.startswith("moebius: ")] == lines[-1:], lines
    return code, lines[-1], lines[:-1]


def test_no_device(tiny_model: Path) -> None:
    """As this machine is, unless it has one: then all of them are hidden."""
    code, said, _ = served(tiny_model, None, CUDA_VISIBLE_DEVICES="")
    assert code == 2
    assert said.startswith("moebius: --device cuda: torch finds no CUDA device (")


def test_a_driver_that_is_too_old(tiny_model: Path) -> None:
    code, said, _ = served(tiny_model, {**CARD, "driver": TOO_OLD})
    assert code == 2
    assert "is too old (found version 11040)" in said and "--device cpu" in said
    assert "Please" not in said


def test_too_little_memory_for_the_plan(tiny_model: Path) -> None:
    code, said, _ = served(tiny_model, {**CARD, "free": 2**16})
    assert code == 2
    assert "64.0 KiB" in said and "the device's 2.0 GiB" in said


def test_a_cache_that_is_asked_for_and_too_large(tiny_model: Path) -> None:
    code, said, _ = served(tiny_model, CARD, "--kv-cache-memory-bytes", str(4 * GIB))
    assert code == 2
    assert "4.0 GiB" in said and "1.0 GiB" in said


def test_memory_that_ends_while_the_model_is_loaded(tiny_model: Path) -> None:
    """By then the plan has fitted; nothing could be proven either, and the log says so."""
    code, said, before = served(tiny_model, CARD, "--kv-cache-memory-bytes", "4000000")
    assert code == 2
    assert said.startswith(
        "moebius: the device's memory is too small while the model is loaded (CUDA out of memory; "
        "1.0 GiB of 2.0 GiB are free): weights take "
    )
    assert "the KV cache 3.8 MiB" in said
    assert any("too little memory to prove them, 1.0 GiB are left" in line for line in before)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"triton": "3.1.0"}, "triton 3.1.0 is too old; pip install 'triton>=3.6'"),
        ({"triton": None}, "triton is not installed; pip install 'triton>=3.6'"),
    ],
    ids=["triton too old", "no triton"],
)
def test_what_kernels_lack_is_said_before_the_port_opens(
    tiny_model: Path, changed: dict[str, Any], why: str
) -> None:
    """It is no failure: plain PyTorch serves. Here the start ends for another reason."""
    code, _, before = served(tiny_model, CARD | changed, "--kv-cache-memory-bytes", "4000000")
    assert code == 2
    assert len([line for line in before if why in line and "plain PyTorch serves" in line]) == 1


def test_a_device_by_a_number_is_no_device(tiny_model: Path) -> None:
    """Devices are chosen by CUDA_VISIBLE_DEVICES; more ranks than there are, are refused."""
    port = free_port()
    for card in (CARD, None):
        code, lines = ended(
            ["serve", str(tiny_model), "--port", str(port), "--device", "cuda:7"], card, port
        )
        assert code == 2
        assert "cuda:7" in "\n".join(lines) and "Traceback" not in "\n".join(lines)


def test_more_ranks_than_devices(tiny_model: Path) -> None:
    code, said, _ = served(tiny_model, CARD, "--ranks", "2")
    assert code == 2
    assert "--ranks 2: each has a GPU of its own, and this host has 1" in said


def test_training_that_finds_no_room(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Line {n} of some text.\n" for n in range(2000)))
    recipe = (HERE.parents[1] / "recipes" / "tiny.toml").read_text()
    files = f'[corpus.files]\ntext = "{text}"\n[tokenizer]\nvocab_size = 300\n'
    start, rest = recipe.index("[corpus"), recipe.index("[model]")
    (tmp_path / "recipe.toml").write_text(recipe[:start] + files + recipe[rest:])
    out = str(tmp_path / "out")
    command = ["train", str(tmp_path / "recipe.toml"), "--out", out, "--device", "cuda"]
    code, lines = ended(command, CARD, free_port())
    assert code == 2 and lines[-1].startswith(
        "moebius: the model: the device's memory is too small (CUDA out of memory; 1.00 GiB of "
        "2.00 GiB are free); weights, gradients and optimiser take 0."
    )
    assert not any("Traceback" in line for line in lines)


@pytest.mark.parametrize("driver", [None, TOO_OLD], ids=["no such device", "driver too old"])
def test_training_ends_so_too(driver: str | None, tmp_path: Path) -> None:
    """A rank whose number has no device; a driver that does not start."""
    card = CARD | ({} if driver is None else {"driver": driver})
    command = ["train", "recipes/tiny.toml", "--out", str(tmp_path / "out"), "--device", "cuda"]
    code, lines = ended(command, card, free_port(), LOCAL_RANK="1")
    said = "moebius: rank 0 is number 1 on " if driver is None else "moebius: --device cuda: torch"
    assert code == 2 and len(lines) == 1 and lines[0].startswith(said)
    assert ("has 1 CUDA device" if driver is None else "found version 11040") in lines[0]
    assert not (tmp_path / "out").exists()
