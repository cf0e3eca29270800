"""What each technique is worth: one model, one list of requests, and the engine without each.

    .venv/bin/python benchmarks/ablate.py [MODEL] [--rounds 3] [--threads 2]
    [--output-json FILE] [--plot FILE]

Requests are sized by the model's context, at most 1024 tokens. Every engine has the same KV cache
memory, enough for a quarter of the 16 sequences that may run at once. The request rate is four
times what the full engine serves. MODEL is a directory or a name as for `moebius serve`; the
bundled model by default.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from ablation.measure import ablate
from ablation.report import HEAD, LEGEND, panels, plot, rows, table
from moebius.bench.report import check_outputs, save_json
from moebius.engine.config import EngineConfig
from moebius.engine.plan_words import human_bytes
from moebius.errors import MoebiusError
from moebius.models.hub import resolve_model

MAX_NUM_SEQS = 16
MAX_NUM_BATCHED_TOKENS = 256


def options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Take away each technique in turn, and compare.")
    parser.add_argument("model", nargs="?", default="bundled")
    parser.add_argument("--prompts", type=int, default=48, help="requests in all")
    parser.add_argument("--rounds", type=int, default=1, help="the median run of each counts")
    parser.add_argument("--only", action="append", metavar="NAME", help="a variant; repeatable")
    parser.add_argument("--threads", type=int, help="compute threads; default: one a core")
    parser.add_argument("--output-json", type=Path, help="write the figures")
    parser.add_argument("--plot", type=Path, help="draw a chart: .png, .svg or .pdf")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    given = options(arguments)
    check_outputs(given.output_json, given.plot)
    config = EngineConfig(
        max_num_seqs=MAX_NUM_SEQS,
        max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
        threads=given.threads,
    )
    rate, config, outcomes = ablate(
        resolve_model(given.model),
        config,
        num_prompts=given.prompts,
        names=given.only,
        rounds=given.rounds,
        progress=lambda message: print(message, file=sys.stderr),
    )
    memory = human_bytes(config.kv_cache_memory_bytes or 0)
    title = (
        f"{given.model}: {given.prompts} requests at {rate:.2f}/s, at most {MAX_NUM_SEQS} running, "
        f"KV cache {memory}"
    )
    print(f"{title}\n\n{table(HEAD, rows(outcomes))}\n\n{LEGEND}")
    runs = {outcome["name"]: outcome for outcome in outcomes}
    if given.output_json:
        facts = {"model": given.model, "request_rate": rate, "config": asdict(config)}
        save_json(given.output_json, facts | runs)
    if given.plot:
        plot(given.plot, title, list(runs), panels(outcomes))


if __name__ == "__main__":
    try:
        main()
    except MoebiusError as error:
        sys.exit(f"ablate.py: {error}")
