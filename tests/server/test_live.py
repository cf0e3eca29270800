"""The live page's stream and files: who gets them, what is in them, and that nobody costs nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import re
import socket
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

import moebius.server
from moebius.engine.client import (
    EngineStats,
    ExpertLoads,
    ExpertSpread,
    LayerLoad,
    LayerSpread,
    RankSpread,
)
from moebius.errors import EngineError
from moebius.parallel.traffic import Traffic
from moebius.server import live
from moebius.server.page import PAGE_PATHS
from moebius.server.recent import Bins, Recent
from moebius.server.vitals import Heard, Look, frame
from server.serving import engine, http_request, listening, serving, until

FOLDER = Path(moebius.server.__file__).parent / "dashboard"
BEARER = {"Authorization": "Bearer sesame"}


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "INTERVAL", 0.05)


def load(*total_pairs: int, layer: int = 0, top_k: int = 2) -> LayerLoad:
    nothing = (0,) * len(total_pairs)
    return LayerLoad(layer, top_k, 0, math.nan, math.nan, math.nan, (), nothing, total_pairs)


def client(port: int) -> httpx.AsyncClient:
    """Without the certificates that every new client reads, which takes longer than the tests."""
    return httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20, verify=False)


@contextlib.asynccontextmanager
async def watching(port: int, **headers: str) -> AsyncIterator[AsyncIterator[tuple[str, Any]]]:
    """(name, data) of one event after the other."""
    async with (
        client(port) as http,
        http.stream("GET", "/v1/live", headers=headers) as response,
    ):
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")

        async def events() -> AsyncIterator[tuple[str, Any]]:
            name = ""
            async for line in response.aiter_lines():
                if line.startswith("event: "):
                    name = line.removeprefix("event: ")
                elif line.startswith("data: "):
                    yield name, json.loads(line.removeprefix("data: "))

        yield events()


async def gauges_when(events: AsyncIterator[tuple[str, Any]], good: Callable[[Any], bool]) -> Any:
    async with asyncio.timeout(10):
        async for name, data in events:
            if name == "frame" and good(data):
                return data
    raise AssertionError("the stream ended")


# What a frame says


def test_a_frame_is_the_growth_between_two_looks() -> None:
    """Two layers on three ranks. Rank 0 and 2 share expert 1 of layer 0, half and half."""
    before = EngineStats(steps=5, generation_tokens=10, step_tokens_sum=100, now=7.0)
    now = EngineStats(
        steps=9,
        generation_tokens=18,
        step_tokens_sum=150,
        prefix_queries=40,
        prefix_hits=30,
        running=3,
        waiting=2,
        deferred=5,
        used_blocks=4,
        cached_blocks=2,
        total_blocks=16,
        used_states=1,
        total_states=8,
        now=9.0,
    )
    placed = (
        LayerSpread(0, ((0, 1), (2,), (1, 3)), 1.0, 1.0),
        LayerSpread(4, ((0,), (1,), ()), 1, 1),
    )
    ranks = tuple(RankSpread(r, r != 1, Traffic(1, 100 * r, 7, 0.5)) for r in range(3))
    earlier = tuple(RankSpread(r, True, Traffic(1, 10 * r, 7, 0.25)) for r in range(3))
    first = Look(
        before,
        ExpertLoads(1, (load(1, 1, 1, 1), load(5, 5, layer=4))),
        ExpertSpread(1, 0, earlier, placed),
    )
    second = Look(
        now,
        ExpertLoads(2, (load(3, 5, 1, 9), load(5, 5, layer=4))),
        ExpertSpread(2, 6, ranks, placed),
    )
    heard = Heard("ready", 1, [], [], {}, {})
    made = frame(first, second, heard)
    assert made.seconds == 2.0 and made.counts["steps"] == 4 and made.counts["step_tokens"] == 50
    assert made.counts["generation_tokens"] == 8 and made.counts["prefix_hits"] == 30
    assert made.deferred == 2, "those who wait for a prefix wait"
    assert (made.blocks.used, made.blocks.cached, made.blocks.total) == (4, 2, 16)
    assert (made.states.used, made.states.total) == (1, 8)
    assert [(each.layer, each.pairs) for each in made.layers] == [(0, (2, 4, 0, 8)), (4, (0, 0))]
    assert made.group is not None
    assert [rank.pairs for rank in made.group.ranks] == [2 + 4 / 2, 0, 4 / 2 + 8]
    assert made.group.imbalance == [(0, round(10 / (14 / 3), 4))]
    assert [rank.bytes_out for rank in made.group.ranks] == [0, 90, 180]
    assert [rank.seconds_waited for rank in made.group.ranks] == [0.25] * 3
    assert [rank.computing for rank in made.group.ranks] == [True, False, True]
    assert (made.group.epoch, made.group.moves) == (2, 6)


def test_engines_that_began_anew_have_not_shrunk() -> None:
    first = Look(EngineStats(steps=9, now=9.0), ExpertLoads(1, (load(9, 9),)), None)
    second = Look(EngineStats(steps=2, now=1.0), ExpertLoads(1, (load(1, 12),)), None)
    made = frame(first, second, Heard("ready", 0, [], [], {}, {}))
    assert (made.seconds, made.counts["steps"], made.layers[0].pairs) == (0.0, 0, (0, 3))
    other = replace(second, loads=ExpertLoads(1, (load(1, 2, 3),)))
    assert frame(first, other, made.heard).layers[0].pairs == (0, 0, 0)


def test_durations_are_binned_within_five_percent_and_bounded() -> None:
    bins = Bins()
    seconds = [1e-7, *(10 ** (i / 97) for i in range(-400, 400)), 1e9]
    for each in seconds:
        bins.add(each)
    found = bins.take()
    assert sum(count for _, count in found) == len(seconds) and len(found) <= 241
    assert found == sorted(found) and bins.take() == []
    exact = Bins()
    for each in (0.0004, 0.0123, 1.0, 77.0):
        exact.add(each)
        ((milliseconds, count),) = exact.take()
        assert count == 1 and milliseconds == pytest.approx(1000 * each, rel=0.055)


# The stream


def test_the_stream_tells_what_the_server_does() -> None:
    async def check(port: int) -> None:
        async with watching(port) as events:
            name, facts = await anext(events)
            assert name == "facts"
            assert (
                facts["model"] == "tiny" and facts["context"] == 512 and facts["block_size"] == 16
            )
            assert facts["fingerprint"] == "fp_fake" and facts["kv_dtype"] == "int8"
            assert facts["window"] == [{"layer": 3, "top_k": 2, "pairs": [0, 0]}]
            name, first = await anext(events)
            assert name == "frame" and first["seconds"] == 0 and first["heard"]["state"] == "ready"
            assert first["blocks"] == {"used": 16, "cached": 0, "total": 64}
            body = {"model": "tiny", "prompt": "hello", "max_tokens": 20, "ignore_eos": True}
            async with client(port) as http:
                await http.post("/v1/completions", json={**body, "n": 2})
                await http.post("/v1/completions", json={**body, "zzz": 1})
            tokens = first_tokens = between = finished = refused = 0
            pairs = [0, 0]
            async with asyncio.timeout(10):
                while tokens < 40 or not refused:
                    _, now = await anext(events)
                    heard = now["heard"]
                    tokens += now["counts"]["generation_tokens"]
                    first_tokens += sum(count for _, count in heard["first_token"])
                    between += sum(count for _, count in heard["between_tokens"])
                    finished += heard["finished"].get("length", 0)
                    refused += heard["refused"].get("invalid_request", 0)
                    pairs = [a + b for a, b in zip(pairs, now["layers"][0]["pairs"], strict=True)]
            assert (tokens, first_tokens, between, finished, refused) == (40, 2, 38, 2, 1)

    fake = engine(step_seconds=0.002, loads=ExpertLoads(1, (load(7, 8, layer=3),)))
    with listening(fake) as (port, _):
        asyncio.run(check(port))


def test_nothing_is_computed_when_nobody_looks() -> None:
    looks = 0

    def spread() -> None:
        nonlocal looks
        looks += 1

    async def check() -> None:
        async with serving(engine(), spread=spread) as server:
            await server.complete()
            await asyncio.sleep(0.2)
            assert looks == 0 and server.door.metrics.recent is None
            feed = live.LiveFeed(server.door, spread, 0.02)
            for _ in range(2):
                before = looks
                with feed.viewer() as one:
                    with feed.viewer() as two:
                        assert (await one.next()) == (await two.next())
                        await until(lambda before=before: looks > before + 2)
                    assert feed.looks and server.door.metrics.recent is not None
                assert not feed.looks and server.door.metrics.recent is None
                await asyncio.sleep(0.05)
                after = looks
                await asyncio.sleep(0.2)
                assert looks == after

    asyncio.run(check())


def test_a_slow_reader_has_one_frame_waiting_and_misses_the_others() -> None:
    async def check() -> None:
        async with serving(engine()) as server:
            feed = live.LiveFeed(server.door, lambda: None, 0.01)
            with feed.viewer() as slow, feed.viewer() as quick:
                seen = [await quick.next() for _ in range(20)]
                assert await slow.next() == seen[-1]
                server.engine.max_model_len = 99  # a facts event is of the moment
                assert b'"context":99' in feed.facts()

    asyncio.run(check())


def test_a_reader_that_reads_nothing_holds_nobody_up_and_little_memory() -> None:
    """What waits for it is what the sockets hold, and one frame."""

    async def check(port: int) -> None:
        wide = [socket.create_connection(("127.0.0.1", port)) for _ in range(3)]
        for sock in wide:
            sock.sendall(http_request("/v1/live", {}, "GET"))
        async with watching(port) as events:
            async with asyncio.timeout(10):
                for _ in range(20):
                    await anext(events)
        for sock in wide:
            sock.close()

    layers = tuple(load(*range(1000), layer=layer) for layer in range(40))
    with listening(engine(loads=ExpertLoads(1, layers))) as (port, door):
        asyncio.run(check(port))
        deadline = time.monotonic() + 5
        while door.metrics.recent is not None:
            assert time.monotonic() < deadline, "who has left is still looked for"
            time.sleep(0.01)


def test_a_few_may_look_and_one_more_is_told_so() -> None:
    async def check(port: int) -> None:
        async with contextlib.AsyncExitStack() as stack:
            looking = []  # one that is let go of ends
            for _ in range(live.MOST_VIEWERS):
                looking.append(await stack.enter_async_context(watching(port)))
                await anext(looking[-1])
            async with client(port) as http:
                response = await http.get("/v1/live")
            assert response.status_code == 503 and response.headers["retry-after"] == "10"
            assert response.json()["error"]["code"] == "overloaded"
            assert str(live.MOST_VIEWERS) in response.json()["error"]["message"]
        async with asyncio.timeout(5):
            while True:  # those who left make room
                try:
                    async with watching(port) as events:
                        await anext(events)
                    return
                except AssertionError:
                    await asyncio.sleep(0.01)

    with listening(engine()) as (port, _):
        asyncio.run(check(port))


def test_a_failure_ends_the_streams_and_the_next_one_begins_anew() -> None:
    failing = True

    def spread() -> None:
        if failing:
            raise EngineError("away")

    async def check() -> None:
        nonlocal failing
        async with serving(engine()) as server:
            feed = live.LiveFeed(server.door, spread, 0.02)
            with feed.viewer() as first:
                assert await first.next() is None
                failing = False
                with feed.viewer() as second:
                    assert (await second.next() or b"").startswith(b"event: frame")
            assert not feed.looks

    asyncio.run(check())


def test_a_draining_server_says_so_and_ends_the_stream_with_its_last_call() -> None:
    async def check(port: int, fake: Any, door: Any) -> None:
        fake.gate.clear()
        async with client(port) as http, watching(port) as events:
            call = asyncio.create_task(
                http.post("/v1/completions", json={"prompt": "x", "max_tokens": 2})
            )
            await gauges_when(events, lambda now: now["heard"]["calls"] == 1)
            door.drain()
            await gauges_when(events, lambda now: now["heard"]["state"] == "draining")
            fake.gate.set()
            assert (await call).status_code == 200
            async with asyncio.timeout(5):
                async for _ in events:
                    pass
            assert (await http.get("/v1/live")).json()["error"]["code"] == "draining"

    fake = engine()
    with listening(fake) as (port, door):
        asyncio.run(check(port, fake, door))


def test_a_page_that_is_open_does_not_hold_up_the_servers_end() -> None:
    with listening(engine()) as (port, _):
        sock = socket.create_connection(("127.0.0.1", port))
        sock.sendall(http_request("/v1/live", {}, "GET"))
        assert sock.recv(100)
        before = time.monotonic()
    assert time.monotonic() - before < 3
    sock.close()


# Keys


def test_the_files_need_no_key_and_the_figures_do() -> None:
    async def check() -> None:
        async with serving(engine(), api_keys=("sesame",)) as server:
            for path in PAGE_PATHS:
                assert (await server.http.get(path)).status_code == 200
            for url in ("/v1/live", "/v1/live?key=sesame", "/v1/live?api_key=sesame"):
                assert (await server.http.get(url)).status_code == 401
            for path in ("/dashboard/", "/dashboard/page.html", "/dashboard/../metrics"):
                assert (await server.http.get(path)).status_code == 401
            head = await server.http.head("/v1/live", headers=BEARER)
            assert head.status_code == 200 and head.content == b""

    asyncio.run(check())


@pytest.mark.parametrize("given", [(), ("boss",)])
def test_what_all_do_is_shown_to_keys_that_open_metrics(
    tmp_path: Path, given: tuple[str, ...]
) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(
        '[tenant]\nkey = "tenant"\nopens = ["api"]\n[eye]\nkey = "sesame"\nopens = ["metrics"]\n'
    )
    file.chmod(0o600)

    async def check(port: int) -> None:
        async with client(port) as http:
            for key, status in ((None, 401), ("Bearer tenant", 403)):
                headers = {} if key is None else {"Authorization": key}
                assert (await http.get("/v1/live", headers=headers)).status_code == status
        async with watching(port, **BEARER) as events:
            assert (await anext(events))[0] == "facts"

    with listening(engine(), api_keys=given, api_keys_file=file) as (port, _):
        asyncio.run(check(port))


def test_no_prompt_and_no_key_is_in_the_stream() -> None:
    async def check(port: int) -> None:
        async with watching(port, **BEARER) as events, client(port) as http:
            body = {"prompt": "a secret prompt", "max_tokens": 3, "user": "somebody"}
            await http.post("/v1/completions", json=body, headers=BEARER)
            told = [await anext(events) for _ in range(6)]
        text = json.dumps(told)
        assert not re.search("secret|sesame|somebody|cmpl-", text)

    with listening(engine("no secret either"), api_keys=("sesame",)) as (port, _):
        asyncio.run(check(port))


# The files


def test_the_page_is_strict_about_what_it_runs() -> None:
    async def check() -> None:
        async with serving(engine()) as server:
            for path in PAGE_PATHS:
                response = await server.http.get(path)
                policy = dict(
                    part.split(" ", 1)
                    for part in response.headers["content-security-policy"].split("; ")
                )
                assert policy["default-src"] == "'none'" and policy["frame-ancestors"] == "'none'"
                assert {policy[f"{what}-src"] for what in ("script", "style", "connect")} == {
                    "'self'"
                }
                assert "unsafe" not in response.headers["content-security-policy"]
                assert response.headers["x-content-type-options"] == "nosniff"
                assert response.headers["referrer-policy"] == "no-referrer"
            head = await server.http.head("/")
            assert head.status_code == 200 and head.headers["content-type"].startswith("text/html")
            assert (await server.http.post("/", json={})).status_code == 405

    asyncio.run(check())


def test_the_page_loads_its_own_files_and_nothing_else() -> None:
    texts = {file.name: file.read_text() for file in FOLDER.iterdir()}
    for name, text in texts.items():
        addresses = set(re.findall(r"\w+://[^\s\"']+", text)) - {"http://www.w3.org/2000/svg"}
        assert not addresses, name
        assert not re.search(r"innerHTML|document\.write|localStorage|sessionStorage|cookie", text)
    page = texts["page.html"]
    linked = set(re.findall(r'(?:src|href)="([^"]+)"', page))
    assert {f"/{path}" for path in linked if path.startswith("dashboard/")} < PAGE_PATHS
    assert not any(path.startswith("/") for path in linked), (
        "behind a proxy the page may lie deeper"
    )
    assert not re.search(r"<script(?![^>]*src=)|<style|style=|\son\w+=", page), "nothing inline"
    assert {f"/dashboard/{name}" for name in texts} - PAGE_PATHS == {"/dashboard/page.html"}


def test_recent_is_taken_once() -> None:
    recent = Recent()
    recent.first_token.add(0.01)
    recent.refused["overload"] += 2
    assert Heard.take(recent, "ready", 0).refused == {"overload": 2}
    again = Heard.take(recent, "ready", 0)
    assert again.refused == {} and again.first_token == []
