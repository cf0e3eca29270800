"""Costs are found again that steps were made of, and simulated ranks take what can be counted."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moebius.bench.costs import (
    Costs,
    ExchangeCosts,
    ExpertSizes,
    Measured,
    StepCosts,
    StepWork,
)
from moebius.bench.predict import Job, Prediction, Simulation, busiest, mean_imbalance
from moebius.cli.commands import app
from moebius.errors import ConfigError
from moebius.models.store import open_checkpoint
from moebius.moe.placement import Placement

SIZES = ExpertSizes(layers=4, experts=8, top_k=2, row_bytes=100, share=0.5)
STEPS = StepCosts(
    base=0.01,
    per_token=1e-4,
    per_context=1e-7,
    per_sample=5e-4,
    per_expert=1e-3,
    per_pair=1e-5,
    error=0.0,
)
LINK = ExchangeCosts(2, 1e-3, 1e6)


def costs(sizes: ExpertSizes = SIZES) -> Costs:
    loads = {layer: [3, 1] * (sizes.experts // 2) for layer in range(sizes.layers)}
    return Costs("tiny", sizes, loads, "a machine", 1, 2, STEPS, {"shared memory": LINK})


def predicted(
    ranks: int,
    jobs: list[Job],
    exchange: ExchangeCosts | None = LINK,
    concurrency: int = 8,
    imbalance: float = 1.0,
) -> Prediction:
    simulation = Simulation(
        SIZES,
        STEPS,
        ranks,
        concurrency=concurrency,
        max_num_batched_tokens=512,
        max_model_len=64,
        imbalance=imbalance,
    )
    return simulation.run(jobs).over(exchange)


def test_the_fit_finds_what_steps_were_made_of() -> None:
    rng = random.Random(0)
    measured = []
    for _ in range(40):
        tokens = rng.randint(1, 500)
        context = rng.randint(tokens, 100 * tokens)
        pairs = tokens * SIZES.top_k * SIZES.layers
        drawn = rng.randint(1, tokens)
        work = StepWork(tokens, context, drawn, SIZES.read(tokens), pairs)
        measured.append(Measured(work, STEPS.seconds(work)))
    found = StepCosts.fit(measured, SIZES)
    assert found.base == pytest.approx(STEPS.base, rel=1e-3)
    assert found.per_context == pytest.approx(STEPS.per_context, rel=1e-3)
    assert found.per_sample == pytest.approx(STEPS.per_sample, rel=1e-3)
    assert found.per_expert == pytest.approx(STEPS.per_expert, rel=1e-3)
    both = found.per_token + found.per_pair * SIZES.top_k * SIZES.layers
    assert both == pytest.approx(1e-4 + 8e-5, rel=1e-3)
    assert found.error < 1e-3


def test_no_cost_is_below_nothing() -> None:
    measured = [
        Measured(StepWork(n, n, 1, SIZES.read(n), 8 * n), 1.0 - 0.001 * n) for n in (1, 10, 100)
    ]
    found = StepCosts.fit(measured, SIZES)
    assert min(found.base, found.per_token, found.per_context, found.per_expert) >= 0


def test_an_exchange_is_its_latency_and_its_bytes() -> None:
    bytes_out = [0.0, 1e3, 1e5, 1e6]
    found = ExchangeCosts.fit(2, bytes_out, [1e-3 + each / 1e6 for each in bytes_out])
    assert (found.latency, found.bandwidth) == pytest.approx((1e-3, 1e6))
    # 4 layers and the agreement, with two others
    assert found.seconds(4, 5e5, 3) == pytest.approx(10e-3 + 0.5)
    # as it was measured among three
    assert ExchangeCosts(3, 1e-3, 1e6).seconds(4, 5e5, 3) == pytest.approx(5e-3 + 0.5)


def test_bytes_are_those_of_drawn_tokens() -> None:
    """Each row goes once to each rank that has any of its experts; every pair comes home."""
    rng = random.Random(0)
    ranks = 4
    rows = 0
    drawn = 20_000
    for _ in range(drawn):
        chosen = {e * ranks // SIZES.experts for e in rng.sample(range(SIZES.experts), 2)}
        rows += len(chosen - {0})
    pairs = drawn * SIZES.top_k * (ranks - 1) / ranks
    expected = (rows + pairs) * SIZES.layers * SIZES.row_bytes / drawn
    assert SIZES.bytes_out(1, ranks) == pytest.approx(expected, rel=0.02)
    assert SIZES.bytes_out(1, 1) == 0


def test_the_busiest_rank_is_that_of_drawn_pairs() -> None:
    rng = random.Random(0)
    for ranks in (2, 4, 16):
        highest = 0
        for _ in range(300):
            counts = [0] * ranks
            for _ in range(400):
                counts[rng.randrange(ranks)] += 1
            highest += max(counts)
        assert busiest(400, ranks) == pytest.approx(highest / 300, rel=0.03)


def test_one_stream_takes_a_step_a_token() -> None:
    """A prompt of 3 tokens and 3 drawn ones, by hand."""
    found = predicted(1, [Job(3, 3)], None, concurrency=1)
    expected = 0.0
    for tokens, context in ((3, 6), (1, 4), (1, 5)):
        read = 4 * 8 * (1 - (6 / 8) ** tokens)
        expected += 0.01 + 1e-4 * tokens + 1e-7 * context + 5e-4 + 1e-3 * read + 1e-5 * tokens * 8
    assert found.steps == 3
    assert found.seconds == pytest.approx(expected)
    assert found.speed == pytest.approx(3 / expected)


def test_two_ranks_share_the_work_and_pay_for_the_exchange() -> None:
    """Two prompts of 3 tokens and 2 drawn ones, one at each rank: two steps, by hand."""
    found = predicted(2, [Job(3, 2), Job(3, 2)])
    expected = exchanged = bytes_out = 0.0
    for tokens, context in ((3, 6), (1, 4)):
        # The rank computes half of the experts that the tokens of both read, and of all pairs as
        # many as the luckless one of two gets.
        read = 4 * 4 * (1 - (6 / 8) ** (2 * tokens))
        pairs = 4 * busiest(2 * tokens * 2, 2)
        expected += 0.01 + 1e-4 * tokens + 1e-7 * context + 5e-4 + 1e-3 * read + 1e-5 * pairs
        # A token has none of 2 choices among the other's 4 of 8 experts with 4/8 * 3/7.
        sent = 4 * tokens * 100 * ((1 - 4 / 8 * 3 / 7) + 2 / 2)
        exchanged += 5 * 1e-3 + sent / 1e6
        bytes_out += sent
    assert found.steps == 2
    assert found.seconds == pytest.approx(expected + exchanged)
    assert found.exchange_share == pytest.approx(exchanged / (expected + exchanged))
    assert found.speed == pytest.approx(4 / (expected + exchanged))
    assert found.tokens == pytest.approx(2)
    assert found.bytes_out == pytest.approx(bytes_out / 2)


def test_a_step_takes_as_long_as_its_slowest_rank() -> None:
    """A long answer at one rank: the other waits with it in each step, and has drawn its own."""
    even = predicted(2, [Job(3, 2), Job(3, 2)])
    uneven = predicted(2, [Job(3, 2), Job(30, 2)])
    assert uneven.steps == even.steps
    assert uneven.seconds > even.seconds
    one = predicted(2, [Job(30, 2), Job(3, 2)])
    assert one.seconds == pytest.approx(uneven.seconds)


def test_the_rank_whose_experts_are_chosen_most_is_waited_for() -> None:
    """Three of four tokens' pairs at one rank: 1.5 of the mean in each of two steps."""
    work = [Job(3, 2), Job(3, 2)]
    uneven = predicted(2, work, imbalance=1.5)
    pairs = 0.0
    for total in (6, 2):
        pairs += 4 * (total * 2 * 1.5 / 2 - busiest(total * 2, 2))
    assert uneven.seconds - predicted(2, work).seconds == pytest.approx(1e-5 * pairs)


def test_imbalance_is_of_the_measured_loads() -> None:
    """By hand: rank 0 has 6 of 8 tokens of one layer, and 4 of 8 of the other."""
    loads = {0: [4, 2, 1, 1], 3: [2, 2, 2, 2]}
    placement = Placement.linear({0: 4, 3: 4}, 2)
    assert mean_imbalance(placement, loads) == (1.5 + 1.0) / 2


def test_free_exchanges_halve_what_computing_takes_at_most() -> None:
    work = [Job(8, 16) for _ in range(16)]
    one = predicted(1, work, None)
    free = predicted(2, work, ExchangeCosts(2, 0.0, 1e15))
    assert free.steps == one.steps
    assert one.seconds / 2 < free.seconds < one.seconds


def test_records_are_read_back_and_others_refused(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    path.write_text(costs().text())
    assert Costs.read(path) == costs()
    path.write_text(json.dumps({"model": "x"}))
    with pytest.raises(ConfigError, match="holds no measured costs"):
        Costs.read(path)
    with pytest.raises(ConfigError, match="holds no measured costs"):
        Costs.read(tmp_path / "none.json")


def test_plan_tells_a_ranks_bytes_and_its_speed(tmp_path: Path, tiny_model: Path) -> None:
    path = tmp_path / "costs.json"
    found = ExpertSizes.of(open_checkpoint(tiny_model).config, 4)
    path.write_text(costs(found).text())
    sizes = ["--max-num-seqs", "4", "--max-model-len", "512", "--kv-cache-memory-bytes", "2097152"]
    run = CliRunner().invoke(
        app, ["plan", str(tiny_model), "--ranks", "2", "--costs", str(path), *sizes]
    )
    assert run.exit_code == 0, run.output
    assert "0 of 2" in run.output and "2 of 4 experts a layer" in run.output
    assert "in a step of 4 sequences that decode at each rank" in run.output
    assert "tokens/s" in run.output and "over shared memory" in run.output
    assert "measured on a machine, 1 thread a rank, 2 at once" in run.output
    assert "exchanges among 2 ranks of one host" in run.output
    path.write_text(costs().text())
    other = CliRunner().invoke(
        app, ["plan", str(tiny_model), "--ranks", "2", "--costs", str(path), *sizes]
    )
    assert other.exit_code != 0 and isinstance(other.exception, ConfigError)
    assert "--costs are those of tiny, whose layers, experts or dtype" in str(other.exception)
    alone = CliRunner().invoke(app, ["plan", str(tiny_model), "--ranks", "2", *sizes])
    assert "give --costs FILE" in alone.output and "tokens/s" not in alone.output


def test_plan_for_a_model_without_experts_is_refused(tmp_path: Path) -> None:
    from oracle import save_tiny

    save_tiny(tmp_path, "llama")
    run = CliRunner().invoke(app, ["plan", str(tmp_path), "--ranks", "2"])
    assert run.exit_code != 0
    assert "no experts" in (run.output + str(run.exception))
