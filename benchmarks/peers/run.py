"""Run our engine and its peers on the same models and workloads, in turn, on this machine, now.

    PEERS=FOLDER python run.py [--peers moebius,vllm,...] [--models m1,m2] [--workloads w1,w2,w4,w3]
    [--reps 3]

For each workload the machine's ceilings are measured first. Where all engines fit into memory they
stay loaded, and the repetitions take turns; otherwise one engine after the other is loaded for the
workload. A repetition that other processes disturbed is made again, on other token ids. The JSON
has every raw run; the table is printed at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common import peers_folder
from drivers import HERE, OURS, PEERS, Driver, DriverError, Setting
from pause import Disturbance, wait_until_calm, watch
from report import summarize, table
from sizes import BF16, SIZES, stored, weights_of
from workloads import NAMES, workload

from moebius.errors import MoebiusError
from moebius.files import check_target, json_record, json_text, write_file

# Memory that a loaded engine is taken to need: so much of its weights, and so much beside them.
WEIGHTS_FACTOR = 1.5
BESIDE_GB = 2.5
# Further draws of a repetition that was disturbed.
RETRIES = 2
# Draws of a retry are numbered from here, so that they never repeat another repetition's.
RETRY_DRAWS = 1000


class Bench:
    """The loaded drivers and the growing record of one run."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.folder = peers_folder()
        self.drivers: dict[str, Driver] = {}
        self.failed: set[tuple[str, Setting]] = set()
        self.record: dict[str, Any] = {
            "machine": _machine(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "settings": {
                key: v.name if isinstance(v, Path) else v for key, v in vars(given).items()
            },
            "ceilings": [],
            "starts": [],
            "runs": [],
            "errors": [],
            "summary": {},
        }

    def phase(self, model: str, names: list[str], prefix_cache: bool) -> None:
        """Workloads that share one setting of the engines."""
        seqs = max(workload(name, SIZES[model].vocab, 1).concurrency for name in names)
        setting = Setting(model, self.given.weights, seqs, self.given.threads, prefix_cache)
        together = self.given.together == "yes" or (
            self.given.together == "auto" and self._fit(model)
        )
        self._read_afresh(model)
        for name in names:
            self._ceilings(model, name)
            for peer, rep in self._turns(together):
                driver = self._driver(peer, setting, name, alone=not together)
                if driver:
                    self._repetition(driver, setting, name, rep)
                self.save()
        self.stop()

    def _read_afresh(self, model: str) -> None:
        """Have the files in the page cache as they are after a restart: in large pages, where the
        kernel makes such of what it reads. What a program has just written lies there in small
        ones, and memory is slower for that."""
        pattern = (
            f"{model}*" if self.given.weights == BF16 else f"{model}-{self.given.weights}.gguf"
        )
        for path in sorted((self.folder / "models").glob(pattern)):
            for file in filter(Path.is_file, path.rglob("*") if path.is_dir() else [path]):
                with file.open("rb", buffering=0) as opened:
                    os.fsync(opened)
                    os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                    while opened.read(2**24):
                        pass

    def _turns(self, together: bool) -> Iterator[tuple[str, int]]:
        reps = range(1, self.given.reps + 1)
        if together:
            return ((peer, rep) for rep in reps for peer in self.given.peers)
        return ((peer, rep) for peer in self.given.peers for rep in reps)

    def _fit(self, model: str) -> bool:
        """Whether all engines can stay loaded beside each other."""
        each = WEIGHTS_FACTOR * self._weights_gb(model) + BESIDE_GB
        return (
            len(self.given.peers) * each
            < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
        )

    def _weights_gb(self, model: str) -> float:
        if self.given.weights == BF16:
            return SIZES[model].parameters * 2 / 1e9
        return self._file(model).stat().st_size / 1e9

    def _file(self, model: str) -> Path:
        """The largest file of its weights."""
        place = weights_of(self.folder / "models", model, self.given.weights)
        if place.is_file():
            return place
        return max(place.glob("*.safetensors"), key=lambda file: file.stat().st_size)

    def _ceilings(self, model: str, name: str) -> None:
        weights = self._file(model)
        calm = wait_until_calm(self.given.patience)
        command = [sys.executable, str(HERE / "ceilings.py")]
        command += ["--threads", str(self.given.threads), "--file", str(weights)]
        answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found: dict[str, float] = json.loads(answer)
        self.record["ceilings"].append({"model": model, "workload": name, "calm": calm, **found})
        _say(f"{model} {name} ceilings {found}")

    def _driver(self, peer: str, setting: Setting, name: str, *, alone: bool) -> Driver | None:
        """The peer's driver, started and warmed up on the workload; None if it failed before."""
        if (peer, setting) in self.failed:
            return None
        if alone:
            self.stop(but=peer)
        try:
            if peer not in self.drivers:
                self.drivers[peer] = Driver(peer, setting, self.folder)
                details = self.drivers[peer].details
                self.record["starts"].append({"peer": peer, **asdict(setting), **details})
                _say(
                    f"{setting.model} {peer} started: first token after "
                    f"{details['first_token_s']:.1f} s"
                )
            driver = self.drivers[peer]
            if name not in driver.warm:
                driver.ask({"workload": name, "draw": 0})
                driver.warm.add(name)
            driver.park()
            return driver
        except DriverError as error:
            self._fail(peer, setting, error)
            return None

    def _repetition(self, driver: Driver, setting: Setting, name: str, rep: int) -> None:
        """One repetition, and its retries if others disturbed it."""
        for attempt in range(1 + RETRIES):
            wait_until_calm(self.given.patience)
            draw = rep + attempt * RETRY_DRAWS
            try:
                with watch(driver.group, driver.pauses, self.given.patience) as disturbed:
                    answer = driver.ask({"workload": name, "draw": draw})
            except DriverError as error:
                self._fail(driver.name, setting, error)
                return
            driver.park()
            self.record["runs"].append(_row(driver.name, setting, name, draw, answer, disturbed))
            _say(
                f"{setting.model} {name} {driver.name} draw {draw}: {answer['wall']:.2f} s, others "
                f"{disturbed.foreign:.1%}, paused {disturbed.paused:.1f} s"
            )
            if disturbed.clean or not self.given.patience:
                return

    def _fail(self, peer: str, setting: Setting, error: DriverError) -> None:
        _say(f"{setting.model} {peer} FAILED: {error}")
        self.failed.add((peer, setting))
        self.record["errors"].append({"peer": peer, **asdict(setting), "error": str(error)})
        if peer in self.drivers:
            self.drivers.pop(peer).stop()

    def stop(self, but: str | None = None) -> None:
        for peer in [peer for peer in self.drivers if peer != but]:
            self.drivers.pop(peer).stop()

    def save(self) -> None:
        models = self.folder / "models"
        held = {
            model: stored(models, model, self.given.weights)
            for model in {run["model"] for run in self.record["runs"]}
        }
        self.record["stored"] = {model: asdict(each) for model, each in held.items()}
        self.record["summary"] = summarize(self.record)
        text = json_text(self.record, indent=1) + "\n"
        write_file(self.given.json, text, ours=json_record)


def _row(
    peer: str,
    setting: Setting,
    name: str,
    draw: int,
    answer: dict[str, Any],
    disturbed: Disturbance,
) -> dict[str, Any]:
    return {
        "peer": peer,
        "model": setting.model,
        "workload": name,
        "draw": draw,
        "prefix_cache": setting.prefix_cache,
        "clean": disturbed.clean,
        **asdict(disturbed),
        **answer,
    }


def _machine() -> dict[str, Any]:
    info = dict(
        line.split(":", 1)
        for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    )
    info = {key.strip(): value.strip() for key, value in info.items()}
    wanted = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16")
    return {
        "processor": info.get("model name", platform.processor()),
        "cores": os.cpu_count(),
        "isa": [flag for flag in wanted if flag in info.get("flags", "").split()],
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def _say(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)


def _names(allowed: Any) -> Any:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        unknown = sorted(set(names) - set(allowed))
        if unknown:
            raise argparse.ArgumentTypeError(
                f"unknown: {', '.join(unknown)}; there are {', '.join(allowed)}"
            )
        return names

    return parse


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--peers", type=_names(PEERS), default=["moebius", "vllm", "openvino", "llama.cpp"]
    )
    parser.add_argument("--models", type=_names(SIZES), default=["m1", "m2"])
    parser.add_argument("--workloads", type=_names(NAMES), default=["w1", "w2", "w4", "w3"])
    parser.add_argument(
        "--weights",
        default=BF16,
        choices=PEERS[OURS].files,
        help="bf16, or the type of PEERS/models/MODEL-TYPE.gguf (moebius, llama.cpp), beside which "
        "openvino has an export of as many bits",
    )
    parser.add_argument("--reps", type=int, default=3, help="repetitions of each workload")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--together", choices=("auto", "yes", "no"), default="auto", help="keep all engines loaded"
    )
    parser.add_argument(
        "--patience",
        type=float,
        default=300,
        help="seconds that a repetition may wait for others; 0: none",
    )
    parser.add_argument(
        "--json", type=Path, help="where the record goes (default: PEERS/results.json)"
    )
    given = parser.parse_args()
    given.json = given.json or peers_folder() / "results.json"
    if others := [peer for peer in given.peers if given.weights not in PEERS[peer].files]:
        sys.exit(f"run.py: {', '.join(others)} run no {given.weights}; name others with --peers")
    try:
        check_target(given.json, json_record)
    except MoebiusError as error:
        sys.exit(f"run.py: {error}")
    # A terminated run ends its drivers too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    bench = Bench(given)
    try:
        for model in given.models:
            # The prefix cache is on where there is a prefix to share, off where it could only cost.
            for cache in (False, True):
                names = [name for name in given.workloads if (name == "w3") == cache]
                if names:
                    bench.phase(model, names, cache)
    finally:
        bench.stop()
        bench.save()
    print(table(bench.record))
    if bench.record["errors"]:
        sys.exit(
            "some engines failed:\n"
            + "\n".join(f"{e['peer']} {e['model']}: {e['error']}" for e in bench.record["errors"])
        )


if __name__ == "__main__":
    main()
