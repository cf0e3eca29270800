"""The live page in a browser, where one is installed; and what it computes, under node."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moebius.server
from moebius.engine.client import ExpertLoads, ExpertSpread, LayerSpread, RankSpread
from moebius.parallel.traffic import Traffic
from moebius.server import live
from server import serving
from server.chromium import PROGRAM, Page, browsing
from server.serving import engine, listening
from server.test_live import load

FIGURES = Path(moebius.server.__file__).parent / "dashboard" / "figures.mjs"
node = shutil.which("node")
needs_node = pytest.mark.skipif(node is None, reason="needs node")
needs_chromium = pytest.mark.skipif(PROGRAM is None, reason="needs chromium")


def figures(expression: str, **values: Any) -> Any:
    """What an expression of the page's functions, as `f`, gives."""
    script = f"""
import * as f from {json.dumps(FIGURES.as_uri())};
const v = {json.dumps(values)};
console.log(JSON.stringify({expression}));
"""
    assert node is not None
    done = subprocess.run(
        [node, "--input-type=module", "-e", script], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_node
def test_events_come_whole_however_the_stream_is_cut() -> None:
    text = "event: facts\ndata: {}\n\n: a comment\n\nevent: frame\ndata: 1\n\ndata: é\n\nevent: x"
    whole = [
        {"name": "facts", "data": "{}"},
        {"name": "frame", "data": "1"},
        {"name": "message", "data": "é"},
    ]
    cut = """v.sizes.map((size) => {
        const parser = new f.EventParser();
        const found = [];
        for (let i = 0; i < v.text.length; i += size) found.push(...parser.take(v.text.slice(i, i + size)));
        return found;
    })"""
    assert figures(cut, text=text, sizes=[1, 2, 3, 5, 1000]) == [whole] * 5


@needs_node
def test_quantiles_are_those_of_the_list() -> None:
    """As numpy's, of the values written out."""
    random = np.random.default_rng(0)
    lists, expected = [], []
    shares = [0.0, 0.1, 0.5, 0.9, 0.99, 1.0]
    for _ in range(20):
        values = random.integers(1, 50, random.integers(1, 9)).tolist()
        counts = random.integers(1, 20, len(values)).tolist()
        half = len(values) // 2
        pairs = list(zip(values, counts, strict=True))
        lists.append([pairs[:half], pairs[half:]])
        all_ = np.repeat(values, counts)
        expected.append(np.quantile(all_, shares, method="inverted_cdf").tolist())
    found = figures(
        "v.lists.map((l) => v.shares.map((s) => f.quantile(f.joined(l), s)))",
        lists=lists,
        shares=shares,
    )
    assert found == expected
    assert figures("[f.quantile([], 0.5)]") == [None]


@needs_node
def test_experts_loads_are_multiples_of_an_even_one() -> None:
    frames = [
        [{"layer": 2, "top_k": 2, "pairs": [1, 0, 3]}, {"layer": 7, "top_k": 1, "pairs": [0, 0]}],
        [{"layer": 2, "top_k": 2, "pairs": [4, 0, 2]}, {"layer": 7, "top_k": 1, "pairs": [0, 0]}],
    ]
    first, second = figures("f.summed(v.frames)", frames=frames)
    assert (
        first == {"layer": 2, "topK": 2, "pairs": [5, 0, 5], "tokens": 5} and second["tokens"] == 0
    )
    mean = statistics.mean(first["pairs"])
    assert figures("f.relative([5, 0, 5])") == [n / mean for n in first["pairs"]]
    found = figures("f.extremes(f.summed(v.frames))", frames=frames)
    assert found == {"busiest": {"layer": 2, "expert": 0, "load": 1.5}, "dead": 1}
    assert figures("[f.relative([0, 0]), f.extremes([]).busiest]") == [None, None]
    assert figures("[0, 0.25, 0.5, 1, 2, 4, 90].map(f.lean)") == [-1, -1, -0.5, 0, 0.5, 1, 1]


@needs_node
def test_lines_have_gaps_where_there_is_nothing() -> None:
    draw = "f.path(v.values, { size: 5, top: 4, height: 100, close: v.close })"
    line = figures(draw, values=[0, 4, None, 2], close=False)
    assert line == "M1 100.00L2 0.00M4 50.00h0"
    area = figures(draw, values=[1, 8], close=True)
    assert area == "M3 75.00L4 0.00L4 100L3 100Z", "beyond the top is at the top"
    assert figures(draw, values=[None, None], close=True) == ""


@needs_node
def test_how_numbers_are_written() -> None:
    numbers = [None, 0, 0.421, 7.26, 41, 418.4, 1204, 38_100, 2_449_000, 3.1e9]
    shown = ["–", "0", "0.42", "7.3", "41", "418", "1,204", "38.1 k", "2.4 M", "3.1 G"]
    assert figures("v.numbers.map(f.short)", numbers=numbers) == shown
    times = [None, 0.42, 8.25, 123.4, 1234, 90_000]
    assert figures("v.times.map((t) => f.duration(t).join(' '))", times=times) == [
        "– ", "0.42 ms", "8.3 ms", "123 ms", "1.23 s", "1.5 min",
    ]  # fmt: skip
    assert figures("[0, 1023, 1536, 2 ** 30, 5e15].map(f.bytes)") == [
        "0 B", "1023 B", "1.5 KiB", "1.0 GiB", "4547 TiB",
    ]  # fmt: skip
    assert figures("[null, 0, 0.034, 0.5, 1].map(f.percent)") == [
        "–",
        "0 %",
        "3.4 %",
        "50 %",
        "100 %",
    ]
    assert figures("[0, 1, 1.2, 7, 96, 101, 8000].map(f.roundTop)") == [
        1,
        1,
        1.5,
        8,
        100,
        150,
        8000,
    ]
    assert figures("[0, 1, 2, 3, 4, 9].map(f.patience)") == [1, 2, 4, 8, 15, 15]
    rates = "[f.rate([{seconds: 2, n: 3}, {seconds: 0.5, n: 2}], (x) => x.n), f.rate([], () => 1)]"
    assert figures(rates) == [2, None]


# In a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    with browsing() as page:
        yield page


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "INTERVAL", 0.2)


def text(page: Page, selector: str) -> str:
    return page.value(f"document.querySelector({selector!r}).innerText")


def shown(selector: str) -> str:
    return f"document.querySelector({selector!r}).checkVisibility()"


def two_ranks() -> ExpertSpread:
    ranks = tuple(RankSpread(rank, True, Traffic(1, 5000, 5000, 0.1)) for rank in range(2))
    return ExpertSpread(3, 2, ranks, (LayerSpread(1, ((0, 1), (2, 3)), 1.0, 1.0),))


@needs_chromium
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_shows_what_the_server_does(browser: Page, width: int) -> None:
    """The key is asked for, is in no address, and nothing is complained of."""
    fake = engine(step_seconds=0.005, loads=ExpertLoads(900, (load(40, 2, 30, 8, layer=1),)))
    with listening(fake, api_keys=("sesame",), spread=two_ranks) as (port, _):
        browser.size(width, 900)
        browser.open(f"http://127.0.0.1:{port}/")
        browser.until(shown("#ask"))
        assert not browser.value(shown("#figures"))
        for key in ("wrong", "sesame"):
            browser.value(
                f"document.getElementById('key').value = '{key}';"
                "document.querySelector('#ask button').click()"
            )
            if key == "wrong":
                browser.until(shown("#refusal"))
        browser.until(shown("#figures"))
        assert not browser.value(shown("#ask")) and text(browser, "#state") == "ready"
        assert text(browser, "h1") == "Moebius tiny"
        assert "25 %" in text(browser, "#blocks") and "16 of 64 blocks" in text(browser, "#blocks")
        body = {"model": "tiny", "prompt": "hello", "max_tokens": 200, "ignore_eos": True, "n": 3}
        data = serving.http_request(
            "/v1/completions", body, Authorization="Bearer sesame", Connection="close"
        )
        assert b"200 OK" in serving.exchange(port, data, 60)
        browser.until("document.querySelector('#first .big').innerText.includes('ms')")
        browser.until("Number(document.querySelector('#tokens .big span').innerText) > 0")
        assert "experts have moved 2 times" in text(browser, "#ranks")
        assert browser.value("document.querySelectorAll('#ranks tbody tr').length") == 2
        assert browser.value("document.documentElement.scrollWidth") <= width
        assert browser.value("location.href") == f"http://127.0.0.1:{port}/"
        assert (
            browser.value("localStorage.length + sessionStorage.length + document.cookie.length")
            == 0
        )
        browser.leave()
    # Both times a key was asked for the browser says 401; it has nothing else to say.
    complaints = [said for said in browser.said if "401 (Unauthorized)" not in said]
    browser.said.clear()
    assert complaints == []


@needs_chromium
def test_without_the_stream_the_page_says_so_and_finds_it_again(browser: Page) -> None:
    browser.size(800, 900)
    with listening(engine()) as (port, _):
        browser.open(f"http://127.0.0.1:{port}/")
        browser.until(shown("#figures"))
    browser.until("document.getElementById('state').innerText === 'not connected'")
    browser.until("document.getElementById('notice').innerText.includes('old')")
    assert browser.value(shown("#figures")), "what was seen stays"
    browser.leave()
    browser.said.clear()


@needs_chromium
def test_one_page_too_many_shows_why(browser: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "MOST_VIEWERS", 0)
    with listening(engine()) as (port, _):
        browser.open(f"http://127.0.0.1:{port}/")
        browser.until("document.getElementById('notice').innerText.includes('live pages are open')")
        monkeypatch.setattr(live, "MOST_VIEWERS", 1)
        browser.until(shown("#figures"), 40)
        assert text(browser, "#state") == "ready" and not browser.value(shown("#notice"))
    browser.leave()
    browser.said.clear()
