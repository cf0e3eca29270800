"""The arguments of moebius.ray:app, and how a replica says that it is well. `-m ray` serves it."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from moebius.errors import ConfigError, EngineError
from moebius.ray import Arguments, Replica


def read(**given: Any) -> Arguments:
    return Arguments.read(given)


def test_arguments_are_the_options_of_serve() -> None:
    """As texts, which `serve run` has, and as values, which a file has."""
    told = read(
        model="/m",
        max_num_seqs="12",
        ranks=2,
        enable_prefix_caching="false",
        served_model_name=["a", "b"],
        api_key="k",
        min_replicas="2",
        max_replicas=3,
    )
    assert told.model == "/m"
    assert (told.config.max_num_seqs, told.config.ranks) == (12, 2)
    assert told.config.enable_prefix_caching is False
    settings = told.options.settings(told.model)
    assert settings.served_model_names == ("a", "b") and settings.api_keys == ("k",)
    assert (told.replicas.min_replicas, told.replicas.max_replicas) == (2, 3)
    assert told.target == 18.0 and told.most_ongoing == 48


def test_defaults() -> None:
    told = read()
    assert told.model == "bundled" and told.replicas.min_replicas == 1
    assert read(**{"max-num-seqs": 1}).config.max_num_seqs == 1
    assert read(max_num_seqs=1).target == 1.0, "an idle replica asks for no other"
    assert read(target_ongoing_requests="5.5").target == 5.5
    assert read(trace=None).config.trace is None


def test_keys_are_those_of_a_replicas_own_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEBIUS_API_KEY", "secret")
    assert read().options.settings("m").api_keys == ("secret",)
    assert read(api_key="other").options.settings("m").api_keys == ("other",)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"modle": "x"}, "no option 'modle'; it has "),
        ({"port": 8000}, "no option 'port'"),
        ({"help": "true"}, "no option 'help'"),
        ({"max_num_seqs": "many"}, "Invalid value for '--max-num-seqs'"),
        ({"max_num_seqs": 0}, "max_num_seqs is 0"),
        ({"ranks": -1}, "ranks is -1"),
        ({"dtype": "int3"}, "dtype is 'int3'"),
        ({"enable_prefix_caching": "perhaps"}, "must be true or false"),
        ({"log_level": "loud"}, "--log-level is 'loud'"),
        ({"api_key": "two words"}, "an API key must be"),
        ({"min_replicas": 3, "max_replicas": 2}, "min_replicas is 3 and max_replicas 2"),
        ({"max_replicas": 0, "min_replicas": 0}, "must be at least 1"),
        ({"target_ongoing_requests": 0}, "target_ongoing_requests is 0"),
        ({"target_ongoing_requests": "nan"}, "target_ongoing_requests is nan"),
    ],
)
def test_a_wrong_argument_is_named(given: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as found:
        Arguments.read(given)
    assert line in str(found.value)


class Processes:
    def __init__(self) -> None:
        self.reason: Exception | None = None
        self.closed = False

    def check(self) -> None:
        if self.reason is not None:
            raise self.reason

    def close(self) -> None:
        self.closed = True


def test_a_replica_is_well_while_tokens_flow() -> None:
    door = SimpleNamespace(ready=True)
    replica = Replica.__new__(Replica)
    processes = Processes()
    vars(replica).update(
        _processes=processes, _app=SimpleNamespace(state=SimpleNamespace(front_door=door))
    )
    asyncio.run(replica.check_health())
    door.ready = False
    with pytest.raises(EngineError, match="not ready"):
        asyncio.run(replica.check_health())
    processes.reason = EngineError("engines were started 5 times")
    with pytest.raises(EngineError, match="started 5 times"):
        asyncio.run(replica.check_health())
    replica.__del__()
    assert processes.closed
