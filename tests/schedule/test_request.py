"""Request: what an engine keeps of a sequence beside what was asked."""

from __future__ import annotations

from moebius.request.engine_request import EngineRequest
from moebius.request.params import SamplingParams
from moebius.schedule.request import Request, RequestStatus
from schedule.making import LIMITS, make_request


def test_tokens_spans_prompt_and_output():
    request = make_request("a", [1, 2, 3], output_ids=[4, 5])
    both = [1, 2, 3, 4, 5]
    for start in range(6):
        for stop in range(start, 6):
            assert request.tokens(start, stop) == both[start:stop]
    assert request.num_tokens == 5 and request.order == (0, 0.0, "a")
    assert not request.finished and request.status is RequestStatus.WAITING


def test_an_engine_changes_nothing_that_the_front_holds():
    asked = EngineRequest.create(
        "a", [1, 2, 3], SamplingParams(), LIMITS, arrival=0.0, output_ids=[4], generation_start=2
    )
    request, again = Request(asked), Request(asked)
    request.output_ids.append(5)
    request.status = RequestStatus.RUNNING
    assert asked.output_ids == (4,) and again.output_ids == [4]
    assert again.status is RequestStatus.WAITING and again.block_hashes == []
    assert again.asked is asked
    for name in EngineRequest.__dataclass_fields__:
        assert name == "output_ids" or getattr(again, name, None) in (None, getattr(asked, name))
