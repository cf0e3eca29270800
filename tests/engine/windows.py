"""An engine's windows at work, whatever family they are of."""

from __future__ import annotations

from pathlib import Path

from moebius.engine.config import EngineConfig
from moebius.engine.load import load_engine
from moebius.request.engine_request import EngineRequest
from moebius.request.params import SamplingParams
from moebius.schedule.request import Request


def assert_windows_are_given_back(directory: Path, *, full: int, windowed: int) -> None:
    """While a prompt of 800 tokens is answered, blocks of 8 are held for `full` block tables of all
    tokens and for `windowed` ones of a window of 24, which lies in three or four blocks."""
    config = EngineConfig(
        block_size=8, max_num_batched_tokens=32, max_num_seqs=2, max_model_len=1024
    )
    engine = load_engine(directory, config)
    windows = [spec.window for spec in engine.scheduler.pool.groups.blocks]
    assert sorted(map(str, windows)) == ["24"] * windowed + ["None"] * full
    params = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
    prompt = [i % 300 for i in range(800)]
    limits = engine.info.limits
    engine.add(Request(EngineRequest.create("a", prompt, params, limits, arrival=0.0, seed=0)))
    request = engine.scheduler.requests["a"]
    while engine.has_work:
        engine.step()
        held = full * -(-request.num_computed_tokens // 8)
        if 1 < len(request.output_ids) < 20:
            assert held + 3 * windowed <= engine.stats().used_blocks <= held + 4 * windowed
        elif engine.has_work:
            # A window's 23 tokens before a step, its 32, and a block that both ends only touch.
            most = (23 + 32 + 6) // 8 + 1
            assert engine.stats().used_blocks <= held + most * windowed
    assert engine.stats().used_blocks == 0
