"""The claims' pass marks against curves worked by hand, and one miniature run from corpus to
report."""

from pathlib import Path
from typing import Any

import pytest

from claims import chart, measure, report
from claims.experiments import DOMAINS, RUNS, SEEDS, recipe_of, write_corpus
from claims.report import CONFIRMED, OPEN, REFUTED, Incomplete, first_step, judged, steps_ratio
from moebius.train.data import prepare


def curve(*losses: float) -> list[dict[str, float]]:
    return [{"step": 100.0 * (i + 1), "loss": loss} for i, loss in enumerate(losses)]


def result(**figures: Any) -> dict[str, Any]:
    routing = {
        "max_violation": [figures.pop("violation", 1.0)],
        "dead_experts": [figures.pop("dead", 0)],
    }
    routing["domain_variation"] = figures.pop("variation", 0.0)
    return {
        "loss": {"all": figures.pop("loss", 1.0)},
        "routing": routing,
        "cpu_seconds": 1.0,
    } | figures


def seeds(*results: dict[str, Any]) -> dict[int, dict[str, Any]]:
    return dict(enumerate(results, 1))


def test_a_curve_reaches_a_loss_between_its_points() -> None:
    assert first_step(curve(3.0, 2.0, 1.0), 1.5) == 250
    assert first_step(curve(3.0, 2.0), 3.5) == 100
    assert first_step(curve(3.0, 2.0), 1.9) == float("inf")
    assert steps_ratio(curve(3.0, 2.0, 1.5), curve(2.0, 1.0, 0.5)) == 300 / 150
    assert steps_ratio(curve(3.0, 2.0), curve(3.0, 2.5)) == 0


def test_marks_hold_in_every_seed_or_not_at_all() -> None:
    def marked(*values: float) -> str:
        return judged(values, lambda x: x >= 1.3, lambda x: x <= 1.0)

    assert (marked(1.3, 2.0), marked(1.2, 2.0), marked(1.0, 2.0)) == (CONFIRMED, OPEN, REFUTED)


def test_time_counts_what_a_step_costs() -> None:
    pair = {"curves": {"dense": curve(3.0, 2.0, 1.5), "e8": curve(2.0, 1.0, 0.5)}}
    pair["step_seconds"] = {"dense": [1.0, 1.0, 9.0], "e8": [1.6, 1.6, 1.6]}
    assert report.less_time({"pair": seeds(pair)}) == (CONFIRMED, "time ratio 1.25 (steps 2)")
    pair["step_seconds"]["e8"] = [2.5, 2.5, 2.5]
    assert report.less_time({"pair": seeds(pair)})[0] == REFUTED


def test_more_experts_must_help_beyond_the_seeds_spread() -> None:
    def row(*means: float) -> str:
        names = ("dense", "e2", "e4", "e8", "e16")
        runs = {
            n: seeds(*(result(loss=m + d) for d in (-0.01, 0.01)))
            for n, m in zip(names, means, strict=True)
        }
        return report.more_experts(runs)[0]

    assert row(5.0, 4.0, 3.0, 2.0, 1.0) == CONFIRMED
    assert row(5.0, 4.0, 3.0, 2.0, 2.01) == OPEN
    assert row(5.0, 4.0, 3.0, 2.0, 2.03) == REFUTED


def test_balance_needs_both_halves() -> None:
    def row(violation: float, loss: float) -> str:
        without = result(violation=violation, at_capacity={"1.25": loss})
        return report.balance(
            {
                "alpha0": seeds(without),
                "e8": seeds(result(violation=0.5, at_capacity={"1.25": 1.0})),
            }
        )[0]

    assert (row(1.0, 1.1), row(0.9, 1.1), row(1.0, 0.9), row(0.5, 1.1)) == (
        CONFIRMED,
        OPEN,
        OPEN,
        REFUTED,
    )


def test_z_loss_and_loss_free_and_global() -> None:
    small, large = (
        result(z=1.0, largest_logit=2.0, loss=1.0),
        result(z=2.0, largest_logit=4.0, loss=1.0),
    )
    both = {
        "e8": seeds(large),
        "z0.001": seeds(small),
        "stress-z0": seeds(large),
        "stress-z0.001": seeds(small),
    }
    assert report.z_loss(both)[0] == CONFIRMED
    assert report.z_loss(both | {"z0.001": seeds(small | {"loss": {"all": 1.5}})})[0] == REFUTED
    assert report.z_loss(both | {"stress-z0.001": seeds(large)})[0] == OPEN
    free = {
        f"bias-{s}-{u}": seeds(result(violation=0.4, loss=0.9))
        for s in ("softmax", "sigmoid")
        for u in ("0.001", "0.01")
    }
    aux = {f"aux-{s}": seeds(result(violation=0.5)) for s in ("softmax", "sigmoid")}
    assert report.loss_free(free | aux)[0] == CONFIRMED
    assert report.loss_free(free | aux | {"aux-softmax": seeds(result(violation=0.3))})[0] == OPEN
    local, whole = result(variation=0.1), result(variation=0.2, loss=0.9)
    assert report.global_balance({"local": seeds(local), "global": seeds(whole)})[0] == CONFIRMED
    assert report.global_balance({"local": seeds(whole), "global": seeds(local)})[0] == REFUTED


def test_what_is_missing_is_named() -> None:
    with pytest.raises(Incomplete, match="e8"):
        report.fewer_steps({"dense": seeds(result())})
    assert {name for name in RUNS if name.startswith("bias")} and len(SEEDS) >= 3


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A standard library of three small folders, and its corpus."""
    root = tmp_path_factory.mktemp("library")
    for folder, name in (
        (".", "m{}.py"),
        ("pydoc_data", "topics.py"),
        ("idlelib", "help{}.html"),
        ("encodings", "cp{}.py"),
    ):
        (root / folder).mkdir(exist_ok=True)
        for i in range(40):
            (root / folder / name.format(i)).write_text(
                f"# {folder} {i}\n" + f"value_{i} = {i}\n" * 150
            )
    work = tmp_path_factory.mktemp("work")
    write_corpus(work / "corpus", root)
    return work


def test_micro_batches_are_of_one_kind(work: Path) -> None:
    recipe = recipe_of("local", RUNS["local"], 1, work / "corpus", 4)
    data = prepare(recipe, work / "data")
    batches = measure.PureBatches(data, {}, 8, 128, 1)
    kinds = batches._shuffled(0)[:, 0].reshape(-1, 2)
    assert (kinds[:, 0] == kinds[:, 1]).all() and len(set(kinds[:, 0].tolist())) == len(DOMAINS)


def test_a_run_from_corpus_to_report(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import moe_claims

    monkeypatch.setattr(measure, "CURVE_EVERY", 2)
    for rows in ("_PROBE_ROWS", "_CURVE_ROWS", "_FINAL_ROWS"):
        monkeypatch.setattr(measure, rows, 8)
    for name in ("dense", "e8", "alpha0"):
        moe_claims.one(name, 1, work, 4, tmp_path)
    found = report.read(tmp_path)
    run = found["e8"][1]
    assert [point["step"] for point in run["curve"]] == [2, 4] and run["saturation"][-1] == 1
    assert found["dense"][1]["parameters"] < run["parameters"] and 0 < run["loss"]["all"] < 8
    assert list(run["at_capacity"]) == [str(factor) for factor in measure.CAPACITIES]
    text = report.report(found)
    chart.draw(found, tmp_path / "claims.png")
    assert (
        text.count("not run") == 6 and text.count("in 1 of 3 seeds") == 5 and "| e8 | 1 |" in text
    )
    assert (tmp_path / "claims.png").stat().st_size > 10_000
