"""Ray clusters as tests have them: nodes of one host or of several, which end with the test."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hosts import wait_until
from namespaces import Where

SOURCE = Path(__file__).parent.parent / "src"
MARK = "MOEBIUS_TEST_OF_RAY"
HERE = Where()
START_SECONDS = 90.0


@dataclass
class RayNodes:
    """A cluster of Ray.

    ip          the head's address
    port        at which its GCS listens
    variables   what who belongs to it has in the environment
    nodes       what keeps each node up
    """

    ip: str
    port: int
    variables: dict[str, str]
    nodes: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"{self.ip}:{self.port}"

    def add(self, where: Where, ip: str, cpus: int) -> subprocess.Popen[str]:
        """One more node; the first one is the head."""
        if self.nodes:
            role = [f"--address={self.address}"]
        else:
            role = ["--head", f"--port={self.port}", "--include-dashboard=false"]
            role += ["--temp-dir", self.variables["RAY_TMPDIR"]]
        process = where.popen(
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *role),
            *("--node-ip-address", ip, "--num-cpus", str(cpus), "--disable-usage-stats"),
            *("--object-store-memory", str(2**27)),
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.nodes.append(process)
        alive = len([node for node in self.nodes if node.poll() is None])
        wait_until(lambda: len(self.state(where)["nodes"]) == alive, START_SECONDS)
        return process

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | self.variables

    def state(self, where: Where = HERE) -> dict[str, Any]:
        """Its nodes, actors and placement groups, as a driver of its own sees them."""
        process = where.popen(
            *(sys.executable, "-c", STATE),
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        out, _ = process.communicate(timeout=60)
        found: dict[str, Any] = json.loads(out.splitlines()[-1]) if out else {"nodes": []}
        return found

    def driver(self, code: str) -> subprocess.Popen[str]:
        """A process that runs this code, once it has said that it is connected."""
        process = HERE.popen(
            *(sys.executable, "-c", code),
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "connected\n"
        return process

    def processes(self, pattern: str) -> dict[int, int]:
        """Processes of this cluster with this in their command line, and their parents."""
        mark = f"{MARK}={self.variables[MARK]}".encode()
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has ended
                command = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                if pattern in command and mark in (path / "environ").read_bytes().split(b"\0"):
                    stat = (path / "stat").read_text().rpartition(")")[2].split()
                    if stat[0] != "Z":
                        found[int(path.name)] = int(stat[1])
        return found

    @property
    def engines(self) -> dict[int, int]:
        return self.processes("moebius.engine.process")

    def end(self, node: subprocess.Popen[str]) -> None:
        """All of a node's processes at once, as a host that loses power."""
        own = _descendants(node.pid)
        for pid in (*own, node.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        node.wait()

    def close(self) -> None:
        for node in self.nodes:
            self.end(node)
        for pid in self.processes(""):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


# What `ray list` would say, without the dashboard that it asks.
STATE = """
import json, ray
ray.init("auto", log_to_driver=False)
from ray.util import placement_group_table
groups = [each["state"] for each in placement_group_table().values()]
nodes = [node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]]
print(json.dumps({"nodes": nodes, "groups": groups}))
"""


def _descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    found = []
    waiting = [pid]
    while waiting:
        own = children.get(waiting.pop(), [])
        found += own
        waiting += own
    return found


@contextmanager
def ray_cluster(ip: str, port: int, *, token: bool = True) -> Iterator[RayNodes]:
    """One without nodes yet. All that it starts is gone behind the block."""
    shown = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    path = os.pathsep.join(filter(None, [str(SOURCE), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as tmp:
        cluster = RayNodes(
            ip,
            port,
            {
                **(shown if token else {"RAY_AUTH_MODE": "disabled"}),
                "RAY_ADDRESS": f"{ip}:{port}",
                "RAY_TMPDIR": tmp,
                "RAY_USAGE_STATS_ENABLED": "0",
                "PYTHONPATH": path,
                MARK: secrets.token_hex(8),
            },
        )
        try:
            yield cluster
        finally:
            cluster.close()
