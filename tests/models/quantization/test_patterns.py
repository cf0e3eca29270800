"""Regular expressions in a quantization_config: what files have works, and none takes for ever."""

from __future__ import annotations

import pytest

from moebius.errors import ConfigError
from moebius.models.quantization import patterns, read_quantization
from moebius.models.quantization.patterns import Patterns
from quantised import args, compressed

NAME = "model.layers.17.mlp.experts.5.gate_proj"


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        (r".*mlp.gate$", False),
        (r".*mlp\.experts\.\d+\.(gate|up|down)_proj$", True),
        (r"model\.layers\.(0|1|2|17)\..*", True),
        (r"^(?!.*experts).*proj", False),
        (r"model.layers.[0-9]{1,2}.mlp.*", True),
        (r"(?:model\.)?layers.*", True),
        (r"(?P<all>.*)\.(?:gate|up)_proj", True),
        (r"(model\.)*layers", True),
        (r".*?\.mlp\..+_proj", True),
        (r"[^|)(*+]*\|?", True),
        (r"model\.(?:layers|\(x\))", True),
    ],
)
def test_what_files_have(pattern: str, matches: bool) -> None:
    assert Patterns([pattern]).match(NAME) == matches
    assert Patterns(["nothing", pattern]).match(NAME) == matches


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$",
        "(?:a|a)*b",
        "(?:.*)*x",
        "((a?)b){30}x",
        "(?:(?:x)*y)+",
        "(.*e){12}x",
    ],
)
def test_repeats_of_choices_are_refused(pattern: str) -> None:
    with pytest.raises(ConfigError, match="repeats what has choices"):
        Patterns([pattern])


@pytest.mark.parametrize("pattern", [".*" * 8 + "x", "(?:.|.)" * 40 + "x", "e?" * 40, ".*e" * 6])
def test_too_many_choices_are_refused(pattern: str) -> None:
    with pytest.raises(ConfigError, match="too many choices"):
        Patterns([pattern])


def test_long_expressions_and_none_are_refused_in_a_short_line() -> None:
    with pytest.raises(ConfigError, match="5000 characters") as error:
        Patterns(["a" * 5000])
    assert len(str(error.value)) < 400
    with pytest.raises(ConfigError, match="no regular expression"):
        Patterns(["(a"])


def test_time_is_bounded_over_all_names(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Patterns([".*a.*a.*a.*x"])
    assert not slow.match("a" * 60)
    monkeypatch.setattr(patterns, "_MOST_SECONDS", 1e-3)
    with pytest.raises(ConfigError, match="too long"):
        for _ in range(1000):
            slow.match("a" * 60)


def test_a_config_with_such_an_expression_is_refused() -> None:
    config = compressed("pack-quantized", args(4, 32), ignore=["re:(.*a)*$"])
    with pytest.raises(ConfigError, match=r"'\(\.\*a\)\*\$' repeats"):
        read_quantization({"quantization_config": config})
