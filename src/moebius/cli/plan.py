"""moebius plan MODEL: what a model takes, without loading it."""

import json
from dataclasses import asdict
from typing import Annotated

import typer

from moebius.cli import options as o
from moebius.config import EngineConfig


@o.takes_engine_config(*o.SIZES)
def plan(
    config: EngineConfig,
    model: o.Model = "bundled",
    tensors: Annotated[
        bool, typer.Option("--tensors", help="List every tensor too: mapped or copied, and its bytes.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Print what weights, KV cache and workspace take, and how many sequences fit; loads nothing."""
    from rich.console import Console
    from rich.table import Table

    from moebius.engine.load import prepare
    from moebius.models.hub import resolve_model

    prepared = prepare(resolve_model(model), config)
    weights = prepared.checkpoint.plan_weights(prepared.plan.dtype, prepared.plan.device) if tensors else []
    if as_json:
        record = asdict(prepared.plan) | {"kv_cache": prepared.plan.kv_cache, "kv_tokens": prepared.plan.kv_tokens}
        if tensors:
            record["tensors"] = [{"name": row.name, "bytes": row.nbytes, "mapped": row.mapped} for row in weights]
        typer.echo(json.dumps(record, indent=2))
        return
    console = Console()
    if tensors:
        table = Table("tensor", "bytes", "", box=None, pad_edge=False)
        for row in weights:
            table.add_row(row.name, f"{row.nbytes:,}", "mapped" if row.mapped else "copied")
        console.print(table)
    print_plan(console, model, prepared.plan.rows())


def print_plan(console: object, model: str, rows: list[tuple[str, str, str]]) -> None:
    """One table: what, how much, remark."""
    from rich.table import Table

    table = Table("", model, "", box=None, pad_edge=False)
    table.columns[1].justify = "right"
    for row in rows:
        table.add_row(*row)
    console.print(table, soft_wrap=True)  # type: ignore[attr-defined]
