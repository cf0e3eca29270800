from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest
import typer
from typer.testing import CliRunner

from moebius.cli.options import Model, options_of
from moebius.errors import ConfigError


@dataclass(frozen=True)
class Oven:
    heat: Annotated[int, "Degrees."] = 180
    mode: Annotated[Literal["fan", "grill"], "How it heats."] = "fan"
    trays: Annotated[Sequence[int], "Which trays are in."] = (1,)
    name: Annotated[str | None, typer.Option("--called", envvar="OVEN", help="Its name.")] = None
    secret: int = 0

    def __post_init__(self) -> None:
        if self.heat > 300:
            raise ConfigError(f"heat is {self.heat}; it must be at most 300")


@dataclass(frozen=True)
class Pan:
    lid: Annotated[bool, "With a lid."] = False


SHOWN = ("heat", "mode", "trays", "name")


def run(decorate: Any, *arguments: str, **environment: str) -> tuple[Any, list[Any]]:
    """A command `bake OVEN`, decorated and called; its result, and what the function was given."""
    given: list[Any] = []
    app = typer.Typer(rich_markup_mode=None)

    def bake(oven: Oven, model: Model = "bread") -> None:
        given.append((oven, model))

    app.command()(decorate(bake))
    return CliRunner().invoke(app, list(arguments), env=environment), given


def test_fields_become_options_and_arrive_as_the_record() -> None:
    arguments = ("rye", "--heat", "220", "--mode", "grill", "--trays", "2", "--trays", "3")
    result, given = run(options_of("oven", Oven, *SHOWN), *arguments, OVEN="Bertha")
    assert result.exit_code == 0, result.output
    assert given == [(Oven(220, "grill", [2, 3], "Bertha"), "rye")]


def test_defaults_are_the_records_unless_the_command_has_its_own() -> None:
    assert run(options_of("oven", Oven, *SHOWN), OVEN="")[1] == [(Oven(trays=[1]), "bread")]
    _, given = run(options_of("oven", Oven, *SHOWN, heat=90, secret=7))
    assert given == [(Oven(heat=90, trays=[1], secret=7), "bread")]


def test_only_the_named_fields_are_options_and_the_help_is_theirs() -> None:
    result, given = run(options_of("oven", Oven, "heat"), "--help")
    assert "--heat" in result.output and "Degrees." in result.output and not given
    assert "--mode" not in result.output and "--oven" not in result.output
    assert run(options_of("oven", Oven, "heat"), "--mode", "grill")[0].exit_code == 2


def test_without_names_every_field_is_an_option() -> None:
    app = typer.Typer(rich_markup_mode=None)
    given: list[Any] = []

    @app.command()
    @options_of("oven", Oven, "heat")
    @options_of("pan", Pan)
    def bake(oven: Oven, pan: Pan) -> None:
        given.append((oven.heat, pan.lid))

    assert CliRunner().invoke(app, ["--lid", "--heat", "200"]).exit_code == 0
    assert given == [(200, True)]


def test_what_the_record_refuses_never_reaches_the_command() -> None:
    result, given = run(options_of("oven", Oven, "heat"), "--heat", "301")
    assert isinstance(result.exception, ConfigError) and not given
    with pytest.raises(ConfigError, match="heat is 400"):
        options_of("oven", Oven, "heat", heat=400)
