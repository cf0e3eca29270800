"""An engine's process with faults: `python faulty_process.py ADDRESS`.

Faults are files in the directory FAULTS; each happens once, for who comes to its place first takes
its file away. A prompt of token KILLER ends the process whenever two tokens of it are drawn.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from moebius.engine import load, process, sampler
from moebius.engine.engine import Engine
from moebius.schedule.scheduler import StepPlan

KILLER = 319


def _is_due(name: str) -> bool:
    try:
        (Path(os.environ["FAULTS"]) / name).unlink()
    except FileNotFoundError:
        return False
    return True


def _faulty(execute: Any) -> Any:
    def with_faults(engine: Engine, plan: StepPlan) -> Any:
        if _is_due("endless step"):
            time.sleep(1000)
        if _is_due("step that raises"):
            raise RuntimeError("out of luck")
        if _is_due("broken device"):
            raise torch.AcceleratorError("an illegal memory access")
        for chunk in plan.chunks:
            request = engine.scheduler.requests[chunk.request_id]
            if request.prompt_ids[0] == KILLER and len(request.output_ids) >= 2:
                os.kill(os.getpid(), signal.SIGKILL)
        return execute(engine, plan)

    return with_faults


def _told_late(sample: Any) -> Any:
    """A device fails when it is asked to, and says so when something is read of it: the tokens."""

    def reading(*args: Any, **kwargs: Any) -> Any:
        if _is_due("device that is told late"):
            raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")
        return sample(*args, **kwargs)

    return reading


def _mortal(load_engine: Any) -> Any:
    def load_or_die(*args: Any, **options: Any) -> Any:
        if _is_due("death while it loads"):
            os.kill(os.getpid(), signal.SIGKILL)
        return load_engine(*args, **options)

    return load_or_die


if __name__ == "__main__":
    Engine._execute = _faulty(Engine._execute)  # type: ignore[method-assign]
    sampler.sample.__globals__["_sample"] = _told_late(sampler._sample)
    load.load_engine = _mortal(load.load_engine)
    os._exit(process.main(*sys.argv[1:]))
