"""Key files: what they say, what is refused, and what each key may do."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

from moebius.errors import ConfigError
from moebius.server.faults import Fault
from moebius.server.keys import KeyRing, read_keys
from moebius.server.quotas import Limits, Quota
from server.serving import MODEL, Server, engine, run, until

SCRAPER_DIGEST = hashlib.sha256(b"scraper").hexdigest()
FILE = f"""
[alice]
key = "of-alice"
weight = 2
max_requests = 1
priority = true

[bob]
key = "of-bob"
max_queued_tokens = 10
requests_per_minute = 3

[prometheus]
sha256 = "{SCRAPER_DIGEST.upper()}"
opens = ["metrics"]

[root]
key = "of-root"
opens = ["api", "metrics"]
"""


def written(tmp_path: Path, text: str = FILE) -> Path:
    path = tmp_path / "keys.toml"
    path.write_text(text)
    path.chmod(0o600)
    return path


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_a_file_says_who_may_do_what(tmp_path: Path) -> None:
    alice, bob, prometheus, root = read_keys(written(tmp_path))
    assert (alice.name, alice.weight, alice.priority) == ("alice", 2.0, True)
    assert alice.digest == hashlib.sha256(b"of-alice").digest()
    assert alice.limits == Limits(max_requests=1)
    assert bob.limits == Limits(max_queued_tokens=10, requests_per_minute=3)
    assert (bob.weight, bob.priority, bob.opens) == (1.0, False, {"api"})
    assert (prometheus.digest, prometheus.opens) == (
        hashlib.sha256(b"scraper").digest(),
        {"metrics"},
    )
    assert root.opens == {"api", "metrics"}
    assert len({key.tenant for key in (alice, bob, prometheus, root)}) == 4


SECRET = "do-not-quote-me"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has 0 keys"),
        (f"[a]\nkey = {SECRET}", "is no TOML"),
        ("a = 1", "[a] is no table"),
        (f'key = "{SECRET}"', "[key] is no table"),
        (f'["a b"]\nkey = "{SECRET}"', "a key's name has 1 to 63"),
        (f'["{"n" * 64}"]\nkey = "{SECRET}"', "a key's name has 1 to 63"),
        (f'[a]\nkey = "{SECRET}"\nwieght = 2', "unknown 'wieght'; known are key, sha256, weight"),
        ("[a]", "[a] needs either key or sha256"),
        (f'[a]\nkey = "{SECRET}"\nsha256 = "{SCRAPER_DIGEST}"', "either key or sha256"),
        (f'[a]\nkey = "{SECRET} "', "without spaces"),
        ("[a]\nkey = 17", "key must be a text"),
        (f'[a]\nsha256 = "{SECRET}"', "64 hexadecimal digits"),
        (f'[a]\nkey = "{SECRET}"\nweight = 0', "from 0.1 to 1000"),
        (f'[a]\nkey = "{SECRET}"\nweight = true', "from 0.1 to 1000"),
        (f'[a]\nkey = "{SECRET}"\nweight = nan', "from 0.1 to 1000"),
        (f'[a]\nkey = "{SECRET}"\nmax_requests = 0', "max_requests must be an integer of 1"),
        (f'[a]\nkey = "{SECRET}"\nmax_queued_tokens = 1.5', "max_queued_tokens must be an integer"),
        (f'[a]\nkey = "{SECRET}"\nrequests_per_minute = "9"', "requests_per_minute must be"),
        (f'[a]\nkey = "{SECRET}"\npriority = 1', "priority must be true or false"),
        (f'[a]\nkey = "{SECRET}"\nopens = []', "opens must be a list"),
        (f'[a]\nkey = "{SECRET}"\nopens = "api"', "opens must be a list"),
        (f'[a]\nkey = "{SECRET}"\nopens = ["api", "all"]', "opens must be a list"),
        (f'[a]\nkey = "{SECRET}"\n[b]\nkey = "{SECRET}"', "'a' and 'b' are one key"),
        (f'[key-1]\nkey = "{SECRET}"', "key-1, key-2"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_said_without_its_keys(
    tmp_path: Path, text: str, said: str
) -> None:
    with pytest.raises(ConfigError) as error:
        KeyRing(("of-an-option",), written(tmp_path, text))
    assert said in str(error.value)
    assert SECRET not in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_not_there_or_open_to_all_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        KeyRing((), tmp_path / "none.toml")
    path = written(tmp_path)
    path.chmod(0o644)
    KeyRing((), path)
    assert "chmod 600" in caplog.text


def test_each_key_opens_what_the_file_says(tmp_path: Path) -> None:
    """However the path is spelled: the router decodes it, and lets a line break pass at its end."""
    metrics = ("/metrics", "/metric%73", "/%6Detrics", "/metrics?x=/health/live", "/metrics%0A")

    async def check(server: Server) -> None:
        for path in metrics:
            for key, status in (
                ("scraper", 200),
                ("of-root", 200),
                ("of-alice", 403),
                ("wrong", 401),
                (SCRAPER_DIGEST, 401),
            ):
                response = await server.http.get(path, headers=bearer(key))
                assert response.status_code == status, (path, key)
        for path in ("/v1/models", "/health", "/v1/moe/stats", "/version", "/nowhere"):
            response = await server.http.get(path, headers=bearer("scraper"))
            assert response.status_code == 403, path
            assert response.json()["error"]["code"] == "key_not_allowed"
        assert (await server.http.get("/v1/models", headers=bearer("of-bob"))).status_code == 200
        assert (await server.http.get("/health/live")).status_code == 200

    run(check, api_keys_file=written(tmp_path))


async def ask(server: Server, key: str, **fields: Any) -> httpx.Response:
    body = {"model": MODEL, "prompt": "hello", "max_tokens": 2, **fields}
    return await server.post("/v1/completions", body, headers=bearer(key))


def check_limited(response: httpx.Response, said: str, seconds: int | None = None) -> None:
    assert response.status_code == 429
    error = response.json()["error"]
    assert (error["code"], error["type"]) == ("rate_limit_exceeded", "rate_limit_error")
    assert said in error["message"]
    assert 1 <= int(response.headers["Retry-After"]) <= 60
    if seconds is not None:
        assert int(response.headers["Retry-After"]) == seconds


def test_a_key_has_its_limit_of_requests_in_flight(tmp_path: Path) -> None:
    async def check(server: Server) -> None:
        server.engine.gate.clear()
        first = asyncio.create_task(ask(server, "of-alice", stream=True))
        await until(lambda: len(server.engine.requests) == 1)
        check_limited(await ask(server, "of-alice"), "1 requests in flight, of at most 1", 1)
        other = asyncio.create_task(ask(server, "of-bob"))  # whose limit it is not
        models = await server.http.get("/v1/models", headers=bearer("of-alice"))
        assert models.status_code == 200
        await until(lambda: len(server.engine.requests) == 2)
        server.engine.gate.set()
        assert (await first).status_code == (await other).status_code == 200
        assert (await ask(server, "of-alice")).status_code == 200
        assert (await ask(server, "of-alice", prompt=[])).status_code == 400
        assert (await ask(server, "of-alice")).status_code == 200
        line = 'moebius:admission_rejections_total{engine="0",model_name="tiny",reason="rate_limit"} 1.0'
        found = await server.http.get("/metrics", headers=bearer("scraper"))
        assert line.replace("moebius:", "moebius_") in found.text

    run(check, api_keys_file=written(tmp_path))


def test_a_key_has_its_limit_of_tokens_that_wait(tmp_path: Path) -> None:
    async def check(server: Server) -> None:
        server.engine.gate.clear()
        long = asyncio.create_task(ask(server, "of-bob", prompt=[5] * 12))  # alone, so it may
        await until(lambda: len(server.engine.requests) == 1)
        check_limited(
            await ask(server, "of-bob", prompt=[5]), "12 tokens of it wait, of at most 10"
        )
        server.engine.gate.set()
        assert (await long).status_code == 200
        assert (await ask(server, "of-bob", prompt=[5] * 9)).status_code == 200

    run(check, api_keys_file=written(tmp_path))


def test_what_has_begun_to_be_answered_waits_no_more(tmp_path: Path) -> None:
    async def check(server: Server) -> None:
        body = {"model": MODEL, "prompt": [5] * 12, "max_tokens": 400, "stream": True}
        options: Mapping[str, Any] = {"json": body, "headers": bearer("of-bob")}
        server.engine.step_seconds = 0.002
        task = asyncio.create_task(server.http.post("/v1/completions", **options))
        await until(lambda: any(count > 2 for count in server.engine.drawn.values()))
        assert (await ask(server, "of-bob", prompt=[5] * 10)).status_code == 200
        assert (await task).status_code == 200

    run(check, engine(), api_keys_file=written(tmp_path))


def test_a_key_has_its_limit_of_requests_a_minute(tmp_path: Path) -> None:
    async def check(server: Server) -> None:
        for _ in range(3):
            assert (await ask(server, "of-bob")).status_code == 200
        check_limited(await ask(server, "of-bob"), "3 requests a minute have begun", 60)
        assert (await ask(server, "of-alice")).status_code == 200

    run(check, api_keys_file=written(tmp_path))


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_any_sixty_seconds_have_at_most_so_many() -> None:
    """By hand: who waits as told is let in, and not before."""
    clock = Clock()
    quota = Quota(clock)
    limits = Limits(requests_per_minute=3)
    begun = []
    for _ in range(40):
        try:
            with quota.request(limits):
                begun.append(clock.now)
            clock.now += 7.0
        except Fault as fault:
            wait = int(fault.headers["Retry-After"])
            clock.now += wait - 1.001
            with pytest.raises(Fault), quota.request(limits):
                pass
            clock.now += 1.001
    assert len(begun) > 12
    for at in begun:
        assert sum(at <= other < at + 60.0 for other in begun) <= 3


def test_priority_is_for_keys_that_may(tmp_path: Path) -> None:
    async def check(server: Server) -> None:
        assert (await ask(server, "of-alice", priority=-1)).status_code == 200
        refused = await ask(server, "of-bob", priority=-1)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "priority"
        assert "with this API key" in refused.json()["error"]["message"]
        assert (await ask(server, "of-bob", priority=0)).status_code == 200

    run(check, engine(priorities=True), api_keys_file=written(tmp_path))


def test_the_engine_hears_whose_a_request_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def check(server: Server) -> None:
        for key in ("of-alice", "of-bob", "of-an-option"):
            assert (await ask(server, key, n=2)).status_code == 200
        shares = [(r.share.account, r.share.weight) for r in server.engine.requests]
        assert shares == [("alice", 2)] * 2 + [("bob", 1)] * 2 + [("key-1", 1)] * 2

    with caplog.at_level("INFO"):
        run(check, api_keys=("of-an-option",), api_keys_file=written(tmp_path))
    assert " key=alice" in caplog.text and "of-alice" not in caplog.text


def test_one_key_alone_shares_with_nobody() -> None:
    async def check(server: Server) -> None:
        assert (await ask(server, "only")).status_code == 200
        assert server.engine.requests[-1].share.account == ""

    run(check, api_keys=("only",))


def test_a_file_is_read_again_and_a_bad_one_changes_nothing(tmp_path: Path) -> None:
    path = written(tmp_path)

    async def check(server: Server) -> None:
        keys = server.app.state.keys
        for _ in range(3):
            assert (await ask(server, "of-bob")).status_code == 200
        path.write_text(FILE.replace("of-alice", "new-of-alice"))
        keys.reload()
        assert (await ask(server, "of-alice")).status_code == 401
        assert (await ask(server, "new-of-alice")).status_code == 200
        assert (await ask(server, "of-bob")).status_code == 429, "what was used is forgotten"
        path.write_text("[alice]\nkey = ")
        with pytest.raises(ConfigError):
            keys.reload()
        path.unlink()
        with pytest.raises(ConfigError):
            keys.reload()
        assert (await ask(server, "new-of-alice")).status_code == 200
        path.write_text('[alice]\nkey = "x"')
        keys.reload()
        assert (await ask(server, "of-bob")).status_code == 401

    run(check, api_keys_file=path)
