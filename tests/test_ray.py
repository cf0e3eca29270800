"""A real Ray cluster serves one model, bit for bit as one process does, and outlives what its ranks
suffer. `-m ray` starts the clusters; Ray has to be installed."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

import namespaces
from hosts import Asking, Serving, bodies, wait_until
from moebius.models.hub import resolve_model
from namespaces import Where
from ray_nodes import HERE, RayNodes, ray_cluster
from serving import serving

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]
SIZES = ("--kv-cache-memory-bytes", "16777216")


@pytest.fixture(scope="module", autouse=True)
def _asked_for(request: pytest.FixtureRequest) -> None:
    if "ray" not in request.config.getoption("-m"):
        pytest.skip("-m ray starts Ray clusters")
    pytest.importorskip("ray")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


@pytest.fixture(scope="module")
def ray_of_one_host() -> Iterator[RayNodes]:
    with ray_cluster("127.0.0.1", free_port()) as cluster:
        cluster.add(HERE, "127.0.0.1", cpus=3)
        yield cluster


@pytest.fixture(scope="module")
def asked() -> list[dict[str, Any]]:
    return bodies("bundled", count=4, max_tokens=150)


@pytest.fixture(scope="module")
def expected(asked: list[dict[str, Any]]) -> list[Any]:
    with serving(resolve_model("bundled"), "bundled") as url:
        found = Asking(Where(), url, asked).answers()
    assert len({each["text"] for each in found}) == 4
    return found


@contextmanager
def front(cluster: RayNodes, *options: str, where: Where = HERE) -> Iterator[tuple[Serving, str]]:
    """A `moebius serve --ray` that serves, and its address."""
    started = Serving(
        where, "bundled", "--port", "0", "--ray", *SIZES, *options, **cluster.variables
    )
    try:
        line = started.wait_for("serving on")
        yield started, re.findall(r"http://\S+:\d+", line)[0]
    finally:
        started.close()


def refused(cluster: RayNodes, *options: str, **variables: str) -> str:
    """The last line of a `moebius serve --ray` that ends with 2."""
    command = [sys.executable, "-m", "moebius", "serve", "bundled", "--port", "0", "--ray"]
    ended = subprocess.run(
        [*command, *options],
        env=cluster.environment | variables,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 2, ended.stderr
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("moebius: "), ended.stderr
    return last


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def test_actors_serve_as_one_process_and_outlive_what_is_killed(
    ray_of_one_host: RayNodes, asked: list[dict[str, Any]], expected: list[Any]
) -> None:
    cluster = ray_of_one_host
    with front(cluster, "--ranks", "2", "--threads", "1") as (serve, url):
        serve.wait_for("rank 0 on Ray node .*, rank 1 on Ray node .*; kernels of all")
        assert Asking(HERE, url, asked).answers() == expected
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        body = asked[0]
        answer = client.completions.create(
            model="bundled",
            prompt=body["prompt"],
            max_tokens=body["max_tokens"],
            temperature=body["temperature"],
            seed=body["seed"],
            extra_body={"ignore_eos": True},
        )
        assert answer.choices[0].text == expected[0]["text"]

        # A rank's process: its actor stays, and starts the next one for the front.
        before = cluster.engines
        assert len(before) == 2 and len(set(before.values())) == 2, "an actor a rank"
        lost, kept = sorted(before)
        asking = Asking(HERE, url, asked)
        asking.wait_for_tokens()
        kill(lost)
        assert asking.answers() == expected
        after = cluster.engines
        assert lost not in after and after[kept] == before[kept]
        assert set(after.values()) == set(before.values())

        # A rank's actor, and its process with it: Ray starts it again.
        actor = before[lost]
        asking = Asking(HERE, url, asked)
        asking.wait_for_tokens()
        kill(actor)
        assert asking.answers() == expected
        after = cluster.engines
        assert len(after) == 2 and after[kept] == before[kept] and actor not in after.values()

        # The front: nothing of it is left.
        serve.process.kill()
        died = time.monotonic()
        wait_until(lambda: not cluster.engines, seconds=20)
        assert time.monotonic() - died < 10  # 2 seconds, where the machine is idle
        wait_until(lambda: all(each == "REMOVED" for each in cluster.state()["groups"]))
        wait_until(lambda: not cluster.processes("ray::RankActor"))


def test_a_front_that_is_told_to_ends_in_order(
    ray_of_one_host: RayNodes, asked: list[dict[str, Any]], expected: list[Any]
) -> None:
    """With a rank that has all experts, and as many threads as the node has processors."""
    cluster = ray_of_one_host
    with front(cluster) as (serve, url):
        asking = Asking(HERE, url, asked)
        asking.wait_for_tokens()
        assert serve.end(60) == 0
        assert asking.answers() == expected
    assert not cluster.engines
    wait_until(lambda: not cluster.processes("ray::RankActor"))
    assert all(each == "REMOVED" for each in cluster.state()["groups"])


def test_what_is_asked_wrongly_is_one_line(ray_of_one_host: RayNodes, tmp_path: Path) -> None:
    cluster = ray_of_one_host
    line = refused(cluster, "--ranks", "4", "--threads", "2", "--rdzv-timeout", "5")
    assert "no room for 4 ranks of 2 CPUs" in line and "its nodes have 3 CPUs at" in line
    assert "RAY_AUTH_TOKEN" in refused(cluster, RAY_AUTH_TOKEN="0" * 64)
    assert "RAY_AUTH_TOKEN" in refused(cluster, RAY_AUTH_MODE="disabled")
    nobody = f"127.0.0.1:{free_port()}"
    assert f"no Ray cluster is at RAY_ADDRESS, {nobody}" in refused(cluster, RAY_ADDRESS=nobody)
    assert not cluster.engines
    assert all(each == "REMOVED" for each in cluster.state()["groups"])


def test_a_cluster_that_lets_in_anybody_is_refused() -> None:
    with ray_cluster("127.0.0.1", free_port(), token=False) as cluster:
        cluster.add(HERE, "127.0.0.1", cpus=1)
        line = refused(cluster)
        assert re.search(rf"Ray cluster at .*:{cluster.port} has no authentication", line)
        # Also where this process has a token: that cluster wants none.
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
        assert "has no authentication" in refused(cluster, **token)
        allowed = ("--ray-allow-unauthenticated", "--ranks", "2", "--threads", "1")
        assert "no room for 2 ranks" in refused(cluster, *allowed, "--rdzv-timeout", "5")


def test_a_serve_application_has_replicas_of_one_answer(
    ray_of_one_host: RayNodes, asked: list[dict[str, Any]], expected: list[Any], tmp_path: Path
) -> None:
    """One replica at first; Serve adds another when there is more to do."""
    cluster = ray_of_one_host
    port = free_port()
    file = tmp_path / "serve.json"
    file.write_text(json.dumps(serve_config(port)))
    process = subprocess.Popen(
        [sys.executable, "-m", "ray.serve.scripts", "run", str(file)],
        env=cluster.environment,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: process.poll() is not None or ready(url), seconds=120)
        assert len(cluster.engines) == 1
        deadline = time.monotonic() + 180
        while len(cluster.engines) < 2:
            assert time.monotonic() < deadline, "Serve has added no replica"
            assert Asking(HERE, url, asked).answers() == expected
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        (model,) = client.models.list().data
        assert model.id == "bundled"
        with serving(resolve_model("bundled"), "bundled") as alone:
            for number in range(3):  # to whichever replica each comes
                assert Asking(HERE, url, asked).answers() == expected, number
            for base in (url, alone):
                other = openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0)
                with pytest.raises(openai.BadRequestError) as wrong:
                    other.completions.create(model="bundled", prompt="a", max_tokens=-1)
                assert wrong.value.param == "max_tokens"
        # An engine that is lost takes no request with it.
        asking = Asking(HERE, url, asked)
        asking.wait_for_tokens()
        kill(sorted(cluster.engines)[0])
        assert asking.answers() == expected

        # A replica that is told to go finishes what it has.
        deleting = cluster.driver(DELETE)
        longest = bodies("bundled", count=2, max_tokens=1500)
        asking = Asking(HERE, url, longest)
        asking.wait_for_tokens()
        deleting.communicate("now\n", timeout=90)
        assert not cluster.engines
        answers = asking.answers()
        assert [each["end"] for each in answers] == ["length", "length"]
        assert [len(each["tokens"]) for each in answers] == [1500, 1501]
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(90) is not None
    finally:
        process.kill()


DELETE = """
import ray
ray.init("auto", log_to_driver=False)
from ray import serve
print("connected", flush=True)
input()
serve.delete("moebius")
"""


def serve_config(port: int) -> dict[str, Any]:
    """What `serve run` reads from a file."""
    arguments = {
        "model": "bundled",
        "threads": 1,
        "kv_cache_memory_bytes": 2**24,
        "min_replicas": 1,
        "max_replicas": 2,
        "target_ongoing_requests": 1,
    }
    application = {"name": "moebius", "import_path": "moebius.ray:app", "route_prefix": "/"}
    return {
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [{**application, "args": arguments}],
    }


def ready(url: str) -> bool:
    import httpx

    try:
        return httpx.get(f"{url}/health/ready", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.fixture
def hosts_of_their_own() -> None:
    reason = namespaces.why_not()
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.usefixtures("hosts_of_their_own")
def test_two_hosts_in_a_ray_cluster(asked: list[dict[str, Any]], expected: list[Any]) -> None:
    """A rank on each of two hosts; the one without the front is lost, and comes back."""
    with (
        namespaces.switched(2) as network,
        ray_cluster("10.77.0.1", 26379) as cluster,
    ):
        here, there = network.hosts
        for host, gateway in ((here, "10.77.0.2"), (there, "10.77.0.1")):
            # Ray takes the address that leads to the world for a host's own.
            route = ("ip", "route", "add", "default", "via", gateway)
            subprocess.run([*host.prefix, *route], check=True)
        cluster.add(here, "10.77.0.1", cpus=1)
        other = cluster.add(there, "10.77.0.2", cpus=1)
        options = ("--ranks", "2", "--threads", "1", "--rdzv-timeout", "120")
        with front(cluster, *options, where=here) as (serve, url):
            assert Asking(here, url, asked).answers(300) == expected
            before = set(cluster.engines)
            asking = Asking(here, url, asked)
            asking.wait_for_tokens()
            cluster.end(other)
            serve.wait_for("rank [01] on Ray node .* its host is lost", seconds=30)
            (kept,) = cluster.engines
            assert kept in before
            cluster.add(there, "10.77.0.2", cpus=1)
            assert asking.answers(300) == expected
            assert kept in cluster.engines and len(cluster.engines) == 2
            assert serve.end(60) == 0
        wait_until(lambda: not cluster.engines)
