"""A long text must not stop the other threads of a server: nothing holds the interpreter's lock
while it is encoded."""

from __future__ import annotations

import threading
import time

import pytest

from moebius.text import ChatTemplate, Tokenizer
from text.tiny_tokenizers import byte_level


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(
        byte_level(), templates={"default": ChatTemplate("{{ messages[0].content }}<|im_end|>")}
    )


def longest_wait(call) -> tuple[float, float]:
    """(how long the call took, the longest time that another thread did not get to run meanwhile),
    in seconds."""
    done = threading.Event()
    waits: list[float] = []

    def spin() -> None:
        last = time.perf_counter()
        while not done.is_set():
            now = time.perf_counter()
            waits.append(now - last)
            last = now
            time.sleep(0.001)

    thread = threading.Thread(target=spin)
    thread.start()
    start = time.perf_counter()
    try:
        call()
    finally:
        seconds = time.perf_counter() - start
        done.set()
        thread.join()
    return seconds, max(waits)


@pytest.mark.case("B1")
@pytest.mark.parametrize("special", ["", "<|im_end|>"])
def test_other_threads_run_while_a_text_is_encoded(tokenizer, special):
    text = "a long text of words " * 30_000 + special
    for call in (
        lambda: tokenizer.encode(text),
        lambda: tokenizer.encode_ordinary(text),
        lambda: tokenizer.encode_chat([{"role": "user", "content": text}]),
    ):
        seconds, wait = longest_wait(call)
        assert wait < max(seconds / 2, 0.05)


@pytest.mark.case("B1")
def test_special_text_without_end_takes_linear_time(tokenizer):
    """What resembles special tokens, or is nothing else: processor time grows with the text, not
    with its square."""
    for unit in ("<|im_en", "<|im_end|>", "<s>x"):
        times = []
        for count in (10_000, 40_000):
            start = time.process_time()
            marked, marker = tokenizer._guard.mark({"messages": [unit * count]})
            tokenizer._guard.named(marked["messages"][0], marker or "no marker")
            times.append(time.process_time() - start)
        assert times[1] < 9 * max(times[0], 0.005), (
            unit
        )  # four times the text; the square would be 16
