"""Frames: every record and every error comes back as it was, and what is no frame is a typed error."""

from __future__ import annotations

import inspect
import math
from dataclasses import fields, replace
from hashlib import blake2b
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moebius import errors
from moebius.engine import wire
from moebius.engine.client import (
    EngineInfo,
    EngineStats,
    ExpertLoads,
    LayerLoad,
    StepOutput,
    TokenLogprob,
)
from moebius.engine.config import EngineConfig
from moebius.errors import (
    ChannelClosedError,
    ChannelError,
    ConstraintError,
    ContextExceededError,
    ContextLengthError,
    EngineError,
    EngineLostError,
    MoebiusError,
    OverloadError,
    PeerError,
    RequestError,
    WireError,
)
from moebius.request.engine_request import EngineRequest
from moebius.request.finish import FinishReason
from moebius.request.hashes import BlockHasher
from moebius.request.params import SamplingParams, ServingLimits
from moebius.server.faults import DrainingError

LIMITS = ServingLimits(vocab_size=1000, max_model_len=500, priorities=True)
HASHER = BlockHasher(bytes(range(32)), b"a model", 4)
OTHERS_HASHER = BlockHasher(bytes(32), b"a model", 4)

token_ids = st.integers(0, 999)
finite = st.floats(allow_nan=False, allow_infinity=False, width=64)
params = st.builds(
    SamplingParams,
    n=st.integers(1, 16),
    max_tokens=st.none() | st.integers(20, 50),
    min_tokens=st.integers(0, 20),
    temperature=st.floats(0, 100),
    top_p=st.floats(0, 1),
    top_k=st.integers(-1, 2**31 - 1),
    presence_penalty=st.floats(-2, 2),
    logit_bias=st.dictionaries(
        token_ids, st.integers(-100, 100) | st.floats(-100, 100), max_size=4
    ),
    seed=st.none() | st.integers(-(2**63), 2**64 - 1),
    stop=st.lists(st.text(max_size=5), max_size=3),
    stop_token_ids=st.lists(token_ids, max_size=3),
    ignore_eos=st.booleans(),
    logprobs=st.none() | st.integers(0, 20),
    prompt_logprobs=st.none() | st.integers(0, 20),
)
requests = st.builds(
    EngineRequest.create,
    st.text(max_size=20),
    st.lists(token_ids, min_size=1, max_size=40),
    params,
    st.just(LIMITS),
    arrival=finite,
    eos_ids=st.frozensets(token_ids, max_size=3),
    seed=st.none() | st.integers(-(2**70), 2**70),
    priority=st.integers(-(2**31) + 1, 2**31 - 1),
    deadline=st.none() | finite,
    salt=st.binary(max_size=256),
    generation_start=st.none() | st.sampled_from([0, 1]),
    output_ids=st.lists(token_ids, max_size=5),
    hasher=st.sampled_from([None, HASHER]),
)
logprobs = st.builds(
    TokenLogprob,
    token_ids,
    st.floats(max_value=0, allow_nan=False),
    st.integers(1, 1000),
    st.lists(st.tuples(token_ids, finite), max_size=3).map(tuple),
)
outputs = st.builds(
    StepOutput,
    request_id=st.text(max_size=20),
    token_ids=st.lists(token_ids, max_size=4).map(tuple),
    logprobs=st.lists(logprobs, max_size=2).map(tuple),
    prompt_logprobs=st.lists(logprobs, max_size=2).map(tuple),
    finish_reason=st.none() | st.sampled_from(FinishReason),
    num_cached_tokens=st.integers(0, 2**40),
    at=finite,
    scheduled=st.none() | finite,
    num_preemptions=st.integers(0, 100),
    waits=st.booleans(),
)


def there_and_back(message: Any) -> Any:
    frame = wire.encode(message)
    if isinstance(message, wire.ToEngine):
        return wire.decode_to_engine(frame)
    return wire.decode_from_engine(frame)


@settings(max_examples=150, deadline=None)
@given(requests)
def test_a_request_comes_back_as_it_was(request: EngineRequest) -> None:
    back = there_and_back(wire.Submit(request)).request
    assert back == request
    # Equality leaves this one out, and would take a list for a tuple's like nowhere else.
    assert back.params.plain is request.params.plain
    assert type(back.prompt_ids) is tuple and type(back.stop_ids) is frozenset
    assert wire.received(back, LIMITS, HASHER) == request


@settings(max_examples=100, deadline=None)
@given(st.lists(outputs, max_size=4))
def test_a_steps_outputs_come_back_as_they_were(step: list[StepOutput]) -> None:
    assert there_and_back(wire.Outputs(step)).outputs == step


def test_infinite_log_probabilities_cross() -> None:
    entry = TokenLogprob(3, -math.inf, 1000, ((5, -0.5), (6, -math.inf)))
    step = [StepOutput("a", (3,), (entry,))]
    assert there_and_back(wire.Outputs(step)).outputs == step


LOAD = LayerLoad(3, 2, 100, 1.5, 0.25, 2.0, (7,), (50, 150), (500, 1500))
INFO = EngineInfo(LIMITS, frozenset({1, 2}), 16, 640, "fp_x", prefix_caching=False)
HELD = {0: ((0, 1, 2), (3, 0)), 5: ((1, 3), (0, 2))}
STATS = EngineStats(running=3, step_tokens=tuple(range(14)), last_step=1.5, ready=True)


@pytest.mark.parametrize(
    "message",
    [
        wire.Launch("/a/model", EngineConfig(threads=2), bytes(32), frozenset({1}), "debug"),
        wire.Launch("/a/model", EngineConfig(ranks=2), bytes(32), frozenset(), held=HELD, rank=1),
        wire.Move(7, HELD),
        wire.Move(8, {}),
        wire.Moved(7),
        wire.Abort("a request"),
        wire.ReadLoads(),
        wire.Stop(2.5),
        wire.Heartbeat(),
        wire.Planned([("weights", "1 B", "mapped")], True, "cpu-avx2"),
        wire.Loaded(INFO),
        wire.Stats(STATS),
        wire.Loads(ExpertLoads(7, (LOAD, replace(LOAD, layer=5)))),
        wire.Loads(ExpertLoads()),
    ],
    ids=lambda message: type(message).__name__,
)
def test_every_other_message_comes_back_as_it_was(message: Any) -> None:
    assert there_and_back(message) == message


def test_why_a_rank_keeps_its_experts_crosses() -> None:
    back = there_and_back(wire.Unmoved(7, errors.WeightsError("model.safetensors shrank")))
    assert back.number == 7 and type(back.error) is errors.WeightsError
    assert str(back.error) == "model.safetensors shrank"


def test_what_no_token_was_counted_for_stays_no_number() -> None:
    back = there_and_back(wire.Loads(ExpertLoads(1, (replace(LOAD, cv=math.nan),))))
    assert math.isnan(back.loads.layers[0].cv)


def error_classes() -> list[type[MoebiusError]]:
    found = [cls for _, cls in inspect.getmembers(errors, inspect.isclass)]
    return [cls for cls in found if issubclass(cls, MoebiusError)]


# What each class may be made with beside its text, where that is anything.
FIELDS: dict[type[MoebiusError], dict[str, Any]] = {
    RequestError: {"param": "top_k", "code": "some_code"},
    ContextLengthError: {"param": "messages"},
    ContextExceededError: {
        "context": 10,
        "prompt_tokens": 9,
        "max_tokens": 4,
        "at_least": True,
        "param": "messages",
    },
    ConstraintError: {"param": "structured_outputs", "code": "some_code"},
    OverloadError: {"retry_after": 7.5},
    EngineError: {"error_id": "0badcafe"},
    EngineLostError: {"error_id": "0badcafe"},
    WireError: {"error_id": "0badcafe"},
    ChannelError: {"error_id": "0badcafe"},
    ChannelClosedError: {"error_id": "0badcafe"},
    PeerError: {"ranks": (1, 3), "error_id": "0badcafe"},
}


def made(cls: type[MoebiusError]) -> MoebiusError:
    text = () if cls is ContextExceededError else ("naïve: no such thing",)
    return cls(*text, **FIELDS.get(cls, {}))


@pytest.mark.parametrize("cls", error_classes(), ids=lambda cls: cls.__name__)
def test_every_error_has_a_code_and_comes_back_as_what_it_was(cls: type[MoebiusError]) -> None:
    """Of its own: an error that is added without one fails here."""
    assert "wire_code" in vars(cls), f"{cls.__name__} has no wire_code of its own"
    assert errors.ERRORS_BY_CODE[cls.wire_code] is cls
    error = made(cls)
    given = set(inspect.signature(cls.__init__).parameters) - {"self", "message", "args", "kwargs"}
    assert given == set(FIELDS.get(cls, {})), f"{cls.__name__} is not tried with all of its fields"
    for back in (
        there_and_back(wire.Failed(error)).error,
        there_and_back(wire.Outputs([StepOutput("a", error=error)])).outputs[0].error,
    ):
        assert type(back) is cls and str(back) == str(error) and back.args == error.args
        assert vars(back) == vars(error)
        assert back.facts == error.facts
        for name, value in FIELDS.get(cls, {}).items():
            assert getattr(back, name, value) == value


STABLE = {
    "moebius", "usage", "config", "weights", "tokenizer", "memory_plan", "request", "context_length",
    "context_exceeded", "overload", "deadline", "numerical", "storage", "engine", "engine_lost", "wire", "channel",
    "channel_closed", "peer",
}  # fmt: skip


def test_codes_never_change() -> None:
    """Processes of two releases may speak of an error; a code that is gone here breaks that."""
    assert set(errors.ERRORS_BY_CODE) >= STABLE


def test_a_finer_error_crosses_as_the_class_that_it_refines() -> None:
    back = there_and_back(wire.Failed(DrainingError())).error
    assert type(back) is OverloadError
    assert (str(back), back.retry_after) == ("the server is shutting down", 5.0)


def test_a_text_that_nobody_can_encode_crosses_in_other_words() -> None:
    assert str(there_and_back(wire.Failed(RequestError("what is \ud800?"))).error) == (
        "what is \\ud800?"
    )


def test_every_field_of_a_request_crosses() -> None:
    """The three that a restart and a hybrid model live by are among them."""
    names = {field.name for field in fields(EngineRequest)}
    assert {"generation_start", "prompt_hashes", "output_ids", "salt", "deadline"} <= names
    body = msgspec.msgpack.decode(wire.encode(wire.Submit(asked()))[1:])
    assert set(body[1]) == names


def asked(**changes: Any) -> EngineRequest:
    one = EngineRequest.create(
        "a",
        list(range(1, 11)),
        SamplingParams(),
        LIMITS,
        arrival=0.0,
        salt=b"tenant",
        hasher=HASHER,
    )
    return replace(one, **changes)


def test_an_engine_does_not_believe_hashes_that_are_not_the_prompts() -> None:
    """Another prompt's, or another tenant's: blocks found by them would hold what others said."""
    good = asked()
    assert good.prompt_hashes is not None and len(good.prompt_hashes.hashes) == 2
    for wrong in (
        HASHER.of_prompt(range(2, 12), b"tenant"),
        HASHER.of_prompt(good.prompt_ids, b"another tenant"),
        replace(good.prompt_hashes, hashes=good.prompt_hashes.hashes[:1]),
    ):
        with pytest.raises(WireError, match="request a: its prefix hashes are not those"):
            wire.received(asked(prompt_hashes=wrong), LIMITS, HASHER)


def test_hashes_of_another_launch_are_left_out() -> None:
    foreign = asked(prompt_hashes=OTHERS_HASHER.of_prompt(range(1, 11), b"tenant"))
    assert wire.received(foreign, LIMITS, HASHER) == asked(prompt_hashes=None)
    assert wire.received(asked(), LIMITS, None) == asked(prompt_hashes=None)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"prompt_ids": ()}, "prompt"),
        ({"prompt_ids": (1000,)}, "prompt"),
        ({"output_ids": (-1,)}, "prompt"),
        ({"salt": bytes(257)}, "cache_salt"),
        ({"priority": 2**31}, "priority"),
        ({"arrival": math.nan}, "arrival"),
        ({"deadline": math.inf}, "deadline"),
        ({"generation_start": 11}, "generation_start"),
        ({"max_tokens": 491}, "prompt"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"stop_ids": frozenset({1000})}, "stop_token_ids"),
        ({"seed": -1}, "seed"),
    ],
)
def test_what_came_as_a_frame_is_checked_like_what_came_by_the_front(
    changes: dict[str, Any], named: str
) -> None:
    back = there_and_back(wire.Submit(asked(prompt_hashes=None, **changes))).request
    with pytest.raises(RequestError) as error:
        wire.received(back, LIMITS, HASHER)
    assert error.value.param == named


def body(message: Any) -> Any:
    return msgspec.msgpack.decode(wire.encode(message)[1:])


def framed(value: Any) -> bytes:
    return bytes([wire.VERSION]) + msgspec.msgpack.encode(value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt_ids", [1, 2.5]),
        ("prompt_ids", "12"),
        ("prompt_ids", [True]),
        ("params", {"n": 0}),
        ("params", {"temperature": math.nan}),
        ("params", 7),
        ("seed", "x"),
        ("salt", 5),
        ("stop_ids", [None]),
        ("prompt_hashes", {"key_id": b"x"}),
        ("deadline", "soon"),
    ],
)
def test_a_field_of_another_type_is_refused(field: str, value: Any) -> None:
    tag, request, *rest = body(wire.Submit(asked()))
    with pytest.raises(WireError, match="cannot be read"):
        wire.decode_to_engine(framed([tag, {**request, field: value}, *rest]))


@pytest.mark.parametrize(
    ("message", "place"),
    [
        (wire.Abort("a"), ()),
        (wire.Outputs([]), ()),
        (wire.Outputs([StepOutput("a")]), (1, 0)),
        (wire.Outputs([StepOutput("a", (3,), (TokenLogprob(3, -1.0, 1),))]), (1, 0, 2, 0)),
        (wire.Failed(EngineError("gone")), (1,)),
    ],
    ids=lambda one: type(one).__name__,
)
def test_a_record_with_more_than_it_has_is_another_releases(
    message: Any, place: tuple[int, ...]
) -> None:
    """Without this one it would pass for ours, and what the other end meant with it is lost."""
    found = body(message)
    record = found
    for index in place:
        record = record[index]
    record.append(None)
    assert there_and_back(message) is not None
    decode = wire.decode_to_engine if isinstance(message, wire.Abort) else wire.decode_from_engine
    with pytest.raises(WireError, match="cannot be read"):
        decode(framed(found))


def fields_of(schema: Any) -> Any:
    """A JSON schema without what does not cross: documentation."""
    if isinstance(schema, dict):
        skipped = ("description", "title")
        return {key: fields_of(each) for key, each in schema.items() if key not in skipped}
    return [fields_of(each) for each in schema] if isinstance(schema, list) else schema


# Of version 8. Where a record has changed: raise wire.VERSION, and put here what the test found.
LAYOUT = "5d614e9dced9f818"


def test_a_record_that_changes_needs_another_version() -> None:
    """Records cross without their fields' names, or with names of which unknown ones count for
    nothing."""
    every = tuple[wire.ToEngine, wire.FromEngine]
    schema = msgspec.json.schema(every, schema_hook=lambda kind: {"type": kind.__name__})
    text = msgspec.json.encode(fields_of(schema), order="sorted")
    assert (wire.VERSION, blake2b(text, digest_size=8).hexdigest()) == (8, LAYOUT)


@pytest.mark.parametrize(
    "record",
    [
        ["no_such_code", "text", {}],
        ["overload", "text", {"param": "x"}],
        ["overload", 3, {}],
        ["context_exceeded", "text", {"context": "x", "prompt_tokens": "y", "max_tokens": 1}],
        ["context_exceeded", "text", {"context": 1.5, "prompt_tokens": 9, "max_tokens": 4}],
        ["context_exceeded", "text", {"context": 9, "prompt_tokens": 9, "at_least": "yes"}],
        ["request", "text", {"param": 7}],
        ["request", "text", {"message": "another"}],
        ["overload", "text", {"retry_after": "soon"}],
        ["overload", "text", {"retry_after": True}],
        ["engine", "text", {"error_id": [1]}],
        ["engine", "text", {"error_id": 7}],
        ["peer", "text", {"ranks": "1 b"}],
        ["peer", "text", {"ranks": [1, "b"]}],
        ["moebius", "text", {"args": "x"}],
        ["peer", "text", {}],
        [],
        None,
    ],
)
def test_an_error_that_is_none_is_refused(record: Any) -> None:
    with pytest.raises(WireError):
        wire.decode_from_engine(framed(["failed", record]))


def test_versions_and_directions_are_not_mixed_up() -> None:
    frame = wire.encode(wire.Abort("a"))
    assert frame[0] == wire.VERSION
    with pytest.raises(WireError, match="version 9; this process speaks version 8"):
        wire.decode_to_engine(bytes([9]) + frame[1:])
    with pytest.raises(WireError, match="without a byte"):
        wire.decode_to_engine(b"")
    with pytest.raises(WireError, match="cannot be read"):
        wire.decode_from_engine(frame)
    with pytest.raises(WireError, match="cannot be read"):
        wire.decode_to_engine(wire.encode(wire.Stats(STATS)))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_damaged_frame_is_a_typed_error_or_another_message(data: st.DataObject) -> None:
    message = data.draw(
        st.sampled_from(
            [
                wire.Submit(asked()),
                wire.Outputs([StepOutput("a", (1,), error=OverloadError("full"))]),
                wire.Loads(ExpertLoads(7, (LOAD,))),
            ]
        )
    )
    frame = bytearray(wire.encode(message))
    decode = wire.decode_to_engine if isinstance(message, wire.Submit) else wire.decode_from_engine
    if data.draw(st.booleans()):
        del frame[data.draw(st.integers(0, len(frame) - 1)) :]
        with pytest.raises(WireError):
            decode(bytes(frame))
        return
    for _ in range(data.draw(st.integers(1, 3))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = decode(bytes(frame))
    except WireError:
        return
    assert type(found) is type(message)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=64))
def test_any_bytes_are_a_typed_error(rest: bytes) -> None:
    for decode in (wire.decode_to_engine, wire.decode_from_engine):
        with pytest.raises(WireError):
            decode(bytes([wire.VERSION]) + rest)


def test_nests_without_end_are_a_typed_error() -> None:
    deep = bytes([wire.VERSION]) + b"\x92\xa6failed" + b"\x91" * 200_000
    with pytest.raises(WireError):
        wire.decode_from_engine(deep)
