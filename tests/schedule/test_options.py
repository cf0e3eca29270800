"""Options of the scheduler that cannot be, refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from moebius.errors import ConfigError
from moebius.schedule.config import SchedulerConfig


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("max_num_seqs", 2.5, "max_num_seqs is 2.5; it must be an integer"),
        ("max_num_seqs", True, "max_num_seqs is True; it must be an integer"),
        ("max_num_seqs", 0, "max_num_seqs is 0; it must be at least 1"),
        ("block_size", "16", "block_size is '16'; it must be an integer"),
        ("block_size", 2048, "block_size is 2048; it must be at most 1024"),
        ("enable_prefix_caching", "no", "enable_prefix_caching is 'no'; it must be True or False"),
        ("max_num_batched_tokens", 3, "is less than max_num_seqs"),
    ],
)
def test_options_that_cannot_be(option: str, value: Any, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SchedulerConfig(**{option: value})
    assert says in str(caught.value)


def test_a_time_is_a_number() -> None:
    from moebius.engine.config import EngineConfig

    with pytest.raises(ConfigError, match="step_deadline is 'soon'; it must be a number"):
        EngineConfig(step_deadline="soon")  # type: ignore[arg-type]
