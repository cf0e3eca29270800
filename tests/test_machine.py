"""What the limits of control groups leave, read from made-up trees of v1, v2 and both, and from a
real group."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from moebius import machine

pytestmark = pytest.mark.case("B2")
MIB = 2**20
SYS = "sys/fs/cgroup"
V2 = "31 23 0:28 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
NO_LIMIT = "9223372036854771712"


def v1(controllers: str, root: str = "/", number: int = 40) -> str:
    return (
        f"{number} 31 0:{number} {root} /sys/fs/cgroup/{controllers} rw shared:9 - cgroup cgroup "
        f"rw,{controllers}"
    )


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Makes a root of a file system with 8 GiB of memory, the groups and mounts named, and further
    files."""

    def make(groups: str, mounts: list[str], files: dict[str, str]) -> Path:
        proc = {
            "proc/meminfo": "MemTotal: 8388608 kB\nMemFree: 1 kB\nMemAvailable: 6291456 kB\n",
            "proc/self/cgroup": groups,
            "proc/self/mountinfo": "\n".join(["24 1 254:0 / / rw - ext4 /dev/vda rw", *mounts]),
        }
        for name, text in (proc | files).items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n")
        return tmp_path

    return make


def v2_group(
    path: str, limit: str = "max", used: int = 100, stat: str = "", **more: str
) -> dict[str, str]:
    files = {"memory.max": limit, "memory.current": str(used * MIB), "memory.stat": stat, **more}
    return {f"{SYS}/{path}/{name}": text for name, text in files.items()}


def v1_group(path: str, limit: str = NO_LIMIT, used: int = 100, stat: str = "") -> dict[str, str]:
    files = {
        "memory.limit_in_bytes": limit,
        "memory.usage_in_bytes": str(used * MIB),
        "memory.stat": stat,
    }
    return {f"{SYS}/memory/{path}/{name}": text for name, text in files.items()}


def mib(count: int) -> str:
    return str(count * MIB)


MEMORY_TREES: dict[str, tuple[str, list[str], dict[str, str], int]] = {
    "v2, the group is what the container sees as its root": (
        "0::/",
        [V2],
        v2_group("", mib(700)),
        600,
    ),
    "v2, our own group among others": (
        "0::/user.slice/app",
        [V2],
        v2_group("user.slice/app", mib(700)) | v2_group("user.slice/other", mib(50)),
        600,
    ),
    "v2, the tightest ancestor counts": (
        "0::/pods/one/app",
        [V2],
        v2_group("pods/one/app", mib(700)) | v2_group("pods/one") | v2_group("pods", mib(500), 350),
        150,
    ),
    "v2, memory.high holds up before memory.max ends": (
        "0::/app",
        [V2],
        v2_group("app", mib(700), **{"memory.high": mib(400)}),
        300,
    ),
    "v2, the mount's top is a group above the namespace's": (
        "0::/../app",
        [V2.replace("0:28 / ", "0:28 /.. ")],
        v2_group("app", mib(300)) | v2_group("", mib(250), 90),
        160,
    ),
    "v2, a group outside of what is mounted": ("0::/../other", [V2], v2_group("", mib(300)), 200),
    "v2, the group was removed since": (
        "0::/slice/gone (deleted)",
        [V2],
        v2_group("slice", mib(300)),
        200,
    ),
    "v1, a container that sees its own group only": (
        "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc",
        [v1("memory", "/docker/abc"), v1("cpu,cpuacct", "/docker/abc", 41)],
        v1_group("", mib(700)),
        600,
    ),
    "v1, nested": (
        "4:memory:/a/b",
        [v1("memory")],
        v1_group("a/b", mib(700)) | v1_group("a", mib(600), 580) | v1_group(""),
        20,
    ),
    "v1, a limit above what can be seen": (
        "4:memory:/docker/abc",
        [v1("memory", "/docker/abc")],
        v1_group("", stat=f"hierarchical_memory_limit {mib(400)}"),
        300,
    ),
    "v1, a group beside others' mounts": (
        "4:memory:/docker/abc",
        [
            v1("memory", "/docker/other").replace("/sys/fs/cgroup/memory", "/mnt/other"),
            v1("memory", "/docker/abc", 42),
        ],
        v1_group("", mib(700)) | {"mnt/other/memory.limit_in_bytes": mib(1)},
        600,
    ),
    "hybrid, memory in v1": (
        "4:memory:/app\n1:name=systemd:/app\n0::/app",
        [v1("memory"), V2.replace("/sys/fs/cgroup ", "/sys/fs/cgroup/unified ")],
        v1_group("app", mib(700)) | {f"{SYS}/unified/app/cgroup.procs": "1"},
        600,
    ),
    "hybrid, memory in v2": (
        "4:cpu:/app\n0::/app",
        [v1("cpu"), V2],
        v2_group("app", mib(700)),
        600,
    ),
    "a mount point with a space": (
        "0::/app",
        [V2.replace("/sys/fs/cgroup ", "/sys/fs/c\\040group ")],
        {
            name.replace("fs/cgroup", "fs/c group"): text
            for name, text in v2_group("app", mib(700)).items()
        },
        600,
    ),
    "more is used than allowed": ("0::/app", [V2], v2_group("app", mib(700), 800), 0),
}


@pytest.mark.parametrize("name", MEMORY_TREES)
def test_memory_is_what_the_tightest_group_leaves(write: Callable[..., Path], name: str) -> None:
    groups, mounts, files, expected = MEMORY_TREES[name]
    found = machine.memory(write(groups, mounts, files))
    assert found.available == expected * MIB and found.owner == "cgroup"


@pytest.mark.parametrize(
    ("groups", "mounts", "files"),
    [
        ("0::/", [V2], {}),
        ("0::/app", [V2], v2_group("app")),
        ("4:memory:/", [v1("memory")], v1_group("")),
        ("4:memory:/app", [], v1_group("app", mib(700))),  # a tree that is not mounted here
        ("", [V2], v2_group("", mib(700))),  # a process in no group
    ],
)
def test_without_a_limit_memory_is_the_machines(
    write: Callable[..., Path], groups: str, mounts: list[str], files: dict[str, str]
) -> None:
    assert machine.memory(write(groups, mounts, files)) == machine.Memory(
        6 * 2**30, 8 * 2**30, "machine"
    )


def test_a_limit_beyond_the_machine_does_not_bind(write: Callable[..., Path]) -> None:
    root = write("0::/app", [V2], v2_group("app", mib(64 * 1024)))
    assert machine.memory(root).owner == "machine"


@pytest.mark.parametrize("version", [1, 2])
def test_cached_files_are_free_but_for_those_in_use(
    write: Callable[..., Path], version: int
) -> None:
    """700 MiB, of which 500 are used: 300 are files, of which 80 are mapped, such as libraries."""
    if version == 2:
        stat = (
            f"anon {mib(200)}\ninactive_file {mib(120)}\nactive_file {mib(180)}\nfile_mapped "
            f"{mib(80)}"
        )
        root = write("0::/app", [V2], v2_group("app", mib(700), 500, stat))
    else:
        stat = f"inactive_file 1\ntotal_inactive_file {mib(120)}\ntotal_active_file {mib(180)}\n"
        stat += f"mapped_file 2\ntotal_mapped_file {mib(80)}"
        root = write("4:memory:/app", [v1("memory")], v1_group("app", mib(700), 500, stat))
    assert machine.memory(root).available == (700 - 500 + 300 - 80) * MIB


@pytest.mark.parametrize(
    "name",
    [b"a ", b"a\xff", b"a\x0bb", "a\u2028b".encode(), "a\u00a0b".encode(), b"a:b"],
    ids=ascii,
)
def test_a_group_may_have_any_name(write: Callable[..., Path], name: bytes) -> None:
    root = write("", [V2.replace("/sys/fs/cgroup", "/mnt/" + "c\u00a0g")], {})
    (root / "proc/self/cgroup").write_bytes(b"0::/" + name + b"\n")
    group = root / "mnt" / "c\u00a0g" / os.fsdecode(name)
    group.mkdir(parents=True)
    (group / "memory.max").write_text(mib(700))
    assert machine.memory(root) == machine.Memory(700 * MIB, 700 * MIB, "cgroup")


def test_lines_that_nobody_knows_are_passed_over(write: Callable[..., Path]) -> None:
    root = write(
        "a kernel of its own\n1:memory\n0::/app", ["nothing", V2], v2_group("app", mib(700))
    )
    assert machine.memory(root).available == 600 * MIB


def test_no_more_is_left_than_the_limit(write: Callable[..., Path]) -> None:
    """Counters of a group are not read at the same moment."""
    root = write("0::/app", [V2], v2_group("app", mib(700), 100, f"inactive_file {mib(200)}"))
    assert machine.memory(root).available == 700 * MIB


LIMITS = """
Limit                     Soft Limit           Hard Limit           Units
Max cpu time              unlimited            unlimited            seconds
Max data size             {data:<20} unlimited            bytes
Max address space         {space:<20} unlimited            bytes
"""
UNLIMITED = "unlimited"


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        (
            {"space": mib(3000), "data": UNLIMITED},
            machine.Memory(1000 * MIB, 3000 * MIB, "process"),
        ),
        ({"space": UNLIMITED, "data": mib(900)}, machine.Memory(400 * MIB, 900 * MIB, "process")),
        ({"space": mib(3000), "data": mib(400)}, machine.Memory(0, 400 * MIB, "process")),
        ({"space": UNLIMITED, "data": UNLIMITED}, machine.Memory(6 * 2**30, 8 * 2**30, "machine")),
        (
            {"space": mib(2**20), "data": mib(2**20)},
            machine.Memory(6 * 2**30, 8 * 2**30, "machine"),
        ),
    ],
)
def test_limits_of_the_process_count(
    write: Callable[..., Path], limits: dict[str, str], expected: Any
) -> None:
    used = f"Name:\tpython\nVmSize:\t{2000 * 1024} kB\nVmData:\t{500 * 1024} kB"
    files = {"proc/self/limits": LIMITS.format(**limits).strip(), "proc/self/status": used}
    assert machine.memory(write("", [], files)) == expected


def test_without_proc_there_is_still_an_answer(tmp_path: Path) -> None:
    found = machine.memory(tmp_path)
    assert found.owner == "machine" and 0 < found.available < found.limit


def v1_quota(path: str, quota: int) -> dict[str, str]:
    return {
        f"{SYS}/cpu/{path}/cpu.cfs_quota_us": str(quota),
        f"{SYS}/cpu/{path}/cpu.cfs_period_us": "100000",
    }


@pytest.mark.parametrize(
    ("groups", "mounts", "files", "expected"),
    [
        ("0::/", [V2], {f"{SYS}/cpu.max": "50000 100000"}, 0.5),
        ("0::/app", [V2], {f"{SYS}/app/cpu.max": "max 100000"}, 8),
        ("0::/app", [V2], {f"{SYS}/app/cpu.max": "1200000 100000"}, 8),
        (
            "0::/a/b",
            [V2],
            {f"{SYS}/a/b/cpu.max": "max 100000", f"{SYS}/a/cpu.max": "30000 10000"},
            3,
        ),
        ("3:cpu:/app", [v1("cpu")], v1_quota("app", 50_000), 0.5),
        ("3:cpu,cpuacct:/app", [v1("cpu")], v1_quota("app", 250_000) | v1_quota("", -1), 2.5),
        ("3:cpu:/a/b", [v1("cpu")], v1_quota("a/b", 400_000) | v1_quota("a", 200_000), 2),
        ("3:cpu:/docker/abc", [v1("cpu", "/docker/abc")], v1_quota("", 150_000), 1.5),
        (
            "3:cpu:/app\n0::/app",
            [v1("cpu"), V2.replace("cgroup ", "cgroup/unified ", 1)],
            v1_quota("app", 100_000),
            1,
        ),
        ("3:cpuset:/app", [v1("cpuset")], v1_quota("app", 100_000), 8),
        ("0::/app", [V2], {f"{SYS}/app/cpu.max": "nonsense"}, 8),
    ],
)
def test_processors_are_those_allowed_or_less_by_quota(
    write: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    groups: str,
    mounts: list[str],
    files: dict[str, str],
    expected: float,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    root = write(groups, mounts, files)
    assert machine.processors(root) == expected
    assert machine.threads(root) == max(1, int(expected))


REPORT = (
    "import json; from moebius import machine as m; print(json.dumps([m.memory().available, "
    "m.processors()]))"
)


def report(code: str = REPORT) -> Any:
    return json.loads(
        subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, timeout=120
        ).stdout
    )


def test_a_narrowed_affinity_counts() -> None:
    first = min(os.sched_getaffinity(0))
    assert report(f"import os; os.sched_setaffinity(0, {{{first}}}); {REPORT}")[1] <= 1


@pytest.fixture
def group() -> Iterator[Callable[[str, dict[str, str]], Path]]:
    """Makes a real group below ours, of v1 or of v2; skips where we may not."""
    made: list[Path] = []

    def make(controller: str, limits: dict[str, str]) -> Path:
        line = next(
            (x for x in Path("/proc/self/cgroup").read_text().split() if f":{controller}:" in x),
            None,
        )
        tree = Path("/sys/fs/cgroup", controller if line else "")
        path = (line or Path("/proc/self/cgroup").read_text().split()[-1]).split(":", 2)[2]
        directory = tree / path.lstrip("/") / f"moebius-test-{os.getpid()}"
        try:
            directory.mkdir()
            made.append(directory)
            for name, text in limits.items():
                if (directory / name).exists():
                    (directory / name).write_text(text)
                    return directory
        except OSError as error:
            pytest.skip(f"no group can be made below {directory.parent}: {error.strerror}")
        pytest.skip(f"{directory.parent} passes no {controller} controller on")

    yield make
    for directory in made:
        directory.rmdir()


ENTER = (
    "import os, sys; [open(d + '/cgroup.procs', 'w').write(str(os.getpid())) for d in "
    "sys.argv[1:]]; "
)


def inside(directories: list[Path], code: str) -> Any:
    command = [sys.executable, "-c", ENTER + code, *map(str, directories)]
    return json.loads(
        subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=120).stdout
    )


def test_in_a_real_group_its_limits_count(group: Callable[[str, dict[str, str]], Path]) -> None:
    limit = {"memory.max": mib(200), "memory.limit_in_bytes": mib(200)}
    available, _ = inside([group("memory", limit)], REPORT)
    assert 150 * MIB < available <= 200 * MIB


def test_a_real_quota_counts(group: Callable[[str, dict[str, str]], Path]) -> None:
    quota = {"cpu.max": "50000 100000", "cpu.cfs_quota_us": "50000"}
    assert inside([group("cpu", quota)], REPORT)[1] == 0.5


GENERATE = """
import json
from moebius import LLM, SamplingParams
llm = LLM("bundled")
params = SamplingParams(max_tokens=8, temperature=1, ignore_eos=True, seed=1)
outputs = llm.generate([[4 + i] * 600 for i in range(60)], params, progress=False)
assert all(len(o.outputs[0].token_ids) == 8 for o in outputs)
print(json.dumps([llm.client._engine.runner.cache.nbytes, llm.client._engine.stats().total_blocks * 16]))
"""


def test_an_engine_in_a_real_group_keeps_to_it(
    group: Callable[[str, dict[str, str]], Path],
) -> None:
    """60 sequences of 608 tokens want more cache than 390 MiB leave; they take turns, and all
    end."""
    directory = group("memory", {"memory.max": mib(390), "memory.limit_in_bytes": mib(390)})
    cache, tokens = inside([directory], GENERATE)
    assert cache > 10 * MIB and tokens < 60 * 608
    peak = directory / "memory.peak"
    most = int((peak if peak.exists() else directory / "memory.max_usage_in_bytes").read_text())
    assert cache < most <= 390 * MIB
