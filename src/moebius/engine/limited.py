"""Work that may never end, on a thread of its own, and not waited for for ever."""

import contextvars
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

import torch

from moebius.ops.cuda import device_for_threads

T = TypeVar("T")


class Overdue(Exception):
    """The time was over before the work was done; its thread goes on by itself."""


class _Outcome(Generic[T]):
    value: T
    error: BaseException | None = None


def within(seconds: float, work: Callable[[], T]) -> T:
    """What `work` returns, or raises, computed on another thread in this thread's place: with its
    CUDA device, its modes of gradients and its context variables.

    Raises Overdue where that takes longer. The thread is a daemon, as nothing can end it: what it
    works on must be nobody else's.
    """
    outcome = _Outcome[T]()
    ended = threading.Event()
    context = contextvars.copy_context()
    take_device = device_for_threads()
    inference = torch.is_inference_mode_enabled()
    gradients = torch.is_grad_enabled()

    def run() -> None:
        try:
            take_device()
            with torch.inference_mode(inference), torch.set_grad_enabled(gradients):
                outcome.value = context.run(work)
        except BaseException as error:  # the waiting thread's to raise
            outcome.error = error
        finally:
            ended.set()

    threading.Thread(target=run, name="limited work", daemon=True).start()
    if not ended.wait(seconds):
        raise Overdue
    if outcome.error is not None:
        raise outcome.error
    return outcome.value
