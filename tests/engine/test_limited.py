"""Work on another thread is as if it were done here, and is not waited for for ever."""

from __future__ import annotations

import contextvars
import threading
import time

import pytest
import torch

from moebius.engine.limited import Overdue, within

NAME = contextvars.ContextVar("NAME", default="")


def test_it_returns_and_raises_what_the_work_does() -> None:
    assert within(10, lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        within(10, lambda: 1 // 0)


def test_it_is_computed_in_the_caller_s_place(monkeypatch: pytest.MonkeyPatch) -> None:
    NAME.set("here")
    devices = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)

    def seen() -> tuple[str, bool, bool, bool]:
        here = threading.current_thread() is threading.main_thread()
        return NAME.get(), torch.is_inference_mode_enabled(), torch.is_grad_enabled(), here

    with torch.inference_mode():
        assert within(10, seen) == ("here", True, False, False)
    with torch.no_grad():
        assert within(10, seen) == ("here", False, False, False)
    assert within(10, seen) == ("here", False, True, False)
    assert devices == [3, 3, 3]


def test_what_takes_too_long_is_left_to_itself() -> None:
    goes_on = threading.Event()
    start = time.monotonic()
    with pytest.raises(Overdue):
        within(0.2, lambda: goes_on.wait(60))
    assert 0.2 <= time.monotonic() - start < 30
    goes_on.set()
