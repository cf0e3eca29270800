"""A promise in seconds is never less than it says, and more in proportion where the machine is slow."""

from __future__ import annotations

import pytest

import pace


@pytest.mark.parametrize(("slower", "wanted"), [(0.1, 0.05), (1.0, 0.05), (3.0, 0.15)])
def test_a_promise_grows_with_what_a_loop_takes(
    slower: float, wanted: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "loop", lambda: slower * pace.LOOP_SECONDS)
    assert pace.allowed(0.05) == pytest.approx(wanted)


def test_the_loop_takes_time_of_the_processor() -> None:
    assert pace.LOOP_SECONDS / 100 < pace.loop() < 100 * pace.LOOP_SECONDS
