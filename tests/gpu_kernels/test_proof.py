"""The proof at the start: kernels that are right pass, and those that were broken on purpose are
found, each by its own name, and fall back."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from covering import rest
from gpu_kernels.conftest import DEVICE
from gpu_kernels.fake_cuda import FakeCuda
from moebius.engine import proof as proof_module
from moebius.engine.kv_cache import KVCache
from moebius.engine.proof import (
    LIMIT_SECONDS,
    Proof,
    ProofSizes,
    Schedule,
    layers_of_each_kind,
    prove,
    require_idle,
)
from moebius.engine.workspace import forward
from moebius.errors import EngineError
from moebius.models.decoder import Decoder
from moebius.models.encoder_decoder import decoder_of
from moebius.models.store import open_checkpoint
from moebius.models.store.load import Loader, load_decoder
from moebius.ops.capability import Operation, Use
from moebius.ops.reference import ReferenceOps
from moebius.ops.steps import StepInputs
from moebius.ops.triton import TritonOps, linear
from moebius.ops.triton.checked import CheckedOps
from moebius.ops.triton.tiles import ManyRows
from oracle import save_tiny

FEW = ProofSizes(long=12, step=8, sequences=3)
FLOAT32 = torch.float32
CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("sums_in_order")


def proof_of(
    directory: Path,
    ops: CheckedOps,
    dtype: torch.dtype = FLOAT32,
    sizes: ProofSizes = FEW,
    limit: float = LIMIT_SECONDS,
    device: str = DEVICE,
) -> Proof:
    checkpoint = open_checkpoint(directory)
    name = str(dtype).removeprefix("torch.")
    weights = checkpoint.plan_weights(name, device, ops.formats(dtype), checkpoint.sources_at(None))
    decoder = decoder_of(checkpoint.config, ops, dtype, device="meta")
    loader = Loader(checkpoint, torch.device(device))
    return prove(decoder, loader, weights, block_size=4, sizes=sizes, limit=limit)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("qwen3_next", {"num_experts": 0}),  # those of experts are below, beside what is broken
        *(rest(name, {}) for name in ("qwen3_moe", "gpt_oss", "qwen3_next", "deepseek_v3")),
    ],
)
def test_kernels_that_are_right_are_proven(
    model_type: str, changes: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_tiny(tmp_path, model_type, vocab_size=300, **changes)
    ops = CheckedOps()
    with caplog.at_level(logging.INFO):
        proof = proof_of(tmp_path, ops)
    assert not proof.failed and proof.holds
    assert {Operation.LINEAR, Operation.PAGED_ATTENTION, Operation.SAMPLING} <= proof.operations
    for operation in proof.operations:
        found = ops.capability(Use(operation, FLOAT32))
        assert found is not None and found.by == "triton" and found.batch_invariant
    unasked = ops.capability(Use(Operation.CLIP, FLOAT32))
    assert unasked is not None and not unasked.batch_invariant, "nobody has looked at it"
    count = len(proof.operations)
    assert f"{count} of {count} operations were proven on this card" in caplog.text


def break_kernel(
    monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[[Tensor], Tensor]
) -> None:
    """Let a method's result be another."""
    method = getattr(TritonOps, name)

    def broken(self: TritonOps, *args: Any, **kwargs: Any) -> Any:
        out = method(self, *args, **kwargs)
        return change(out) if isinstance(out, Tensor) else tuple(map(change, out))

    monkeypatch.setattr(TritonOps, name, broken)


def a_little_more(x: Tensor) -> Tensor:
    return x * 1.001


def a_bit_more_beside_many(x: Tensor) -> Tensor:
    """The next number, where a tile would be full."""
    return torch.nextafter(x, torch.full_like(x, torch.inf)) if len(x) > 4 else x


def not_compiled(x: Tensor) -> Tensor:
    raise RuntimeError("out of resource: shared memory, Required: 300000")


def test_each_broken_kernel_is_found_and_falls_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Four at once: a wrong value, two kinds of bits that depend on the number of rows, and what
    does not compile. None of the others is blamed for what it was given."""
    save_tiny(tmp_path, "qwen3_moe", vocab_size=300)
    break_kernel(monkeypatch, "add_rms_norm", a_little_more)
    break_kernel(monkeypatch, "linear", a_bit_more_beside_many)
    break_kernel(monkeypatch, "paged_attention", a_bit_more_beside_many)
    break_kernel(monkeypatch, "experts", not_compiled)
    ops = CheckedOps()
    proof = proof_of(tmp_path, ops)
    assert not proof.holds
    reasons = {operation.value: reason for operation, reason in proof.failed.items()}
    assert reasons.keys() == {"add_rms_norm", "linear", "paged_attention", "experts"}
    assert "where" in reasons["add_rms_norm"] and "is rounding" in reasons["add_rms_norm"]
    assert reasons["experts"] == "RuntimeError: out of resource: shared memory, Required: 300000"
    for name in ("linear", "paged_attention"):
        assert "has not the bits that it had before" in reasons[name]
    for operation in proof.operations:
        found = ops.capability(Use(operation, FLOAT32))
        assert found is not None
        fell_back = operation in proof.failed
        assert (found.by == "reference") == fell_back
        assert found.batch_invariant != fell_back
    lines = [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING]
    assert len(lines) == 4 and all("plain PyTorch computes it" in line for line in lines)
    assert not any("\n" in line for line in lines)
    assert_computes_as_the_reference(tmp_path, ops)


@pytest.mark.parametrize("broken", [False, True])
def test_tiles_for_many_rows_are_used_where_their_bits_are_those_for_few(
    broken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Those of linear layers are broken: they alone are named, and none is used; what computes few
    rows is right, and proven."""
    save_tiny(tmp_path, "qwen3_moe", vocab_size=300)
    in_order = linear._in_order

    def another_bit(x: Tensor, launch: Any, out: Tensor, dtype: torch.dtype) -> None:
        in_order(x, launch, out, dtype)
        if launch.many is None:
            bits = out.view(torch.int16 if out.element_size() == 2 else torch.int32)
            bits ^= 1

    if broken:
        monkeypatch.setattr(linear, "_in_order", another_bit)
    ops = CheckedOps()
    assert ops.many_rows is ManyRows.NEVER
    with caplog.at_level(logging.INFO):
        proof = proof_of(tmp_path, ops, torch.bfloat16)
    assert proof.holds and not proof.failed
    assert ops.many_rows is (ManyRows.NEVER if broken else ManyRows.WHERE_ENOUGH)
    lines = [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING]
    assert len(lines) == (2 if broken else 0)  # logits are linear's, too
    assert all("prompts are computed with those for few" in line for line in lines)
    assert proof.few_alone.keys() <= {Operation.LINEAR, Operation.LOGITS}


def assert_computes_as_the_reference(directory: Path, ops: CheckedOps) -> None:
    """A step of a decode and a prompt, by operations of both kinds."""
    found, wanted = (
        _hidden(load_decoder(directory, FLOAT32, device=DEVICE, ops=each))
        for each in (ops, ReferenceOps())
    )
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def _hidden(decoder: Decoder) -> Tensor:
    specs = decoder.config.caches(FLOAT32)
    device = torch.device(DEVICE)
    cache = KVCache(specs, decoder.ops, num_blocks=8, block_size=4, device=device)
    step = StepInputs.build([[1], [4, 5, 6, 7, 8]], [0, 0], [[3], [5, 0]], 4, device)
    return forward(decoder, cache, step)


def test_a_draw_that_depends_on_the_other_rows_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path, "llama", vocab_size=300)
    draw = TritonOps.draw

    def broken(self: TritonOps, logits: Tensor, rows: Any, *args: Any) -> list[int]:
        found = draw(self, logits, rows, *args)
        return found if len(rows) > 1 else [token ^ 1 for token in found]

    monkeypatch.setattr(TritonOps, "draw", broken)
    proof = proof_of(tmp_path, CheckedOps())
    reason = proof.failed[Operation.SAMPLING]
    assert proof.failed.keys() == {Operation.SAMPLING}
    assert reason.startswith("drawn: a row alone has not the bits")


def test_keys_that_are_written_with_other_bits_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are no result: the next operation would be blamed for what it read."""
    save_tiny(tmp_path, "llama", vocab_size=300)
    store = TritonOps.rotate_and_store

    def broken(
        self: TritonOps, qkv: Tensor, rotation: Any, cache: Any, slots: Tensor, *args: Any
    ) -> Tensor:
        out = store(self, qkv, rotation, cache, slots, *args)
        if len(qkv) < 4:
            at = (slots // 4, slots % 4)
            cache.k[at] = torch.nextafter(cache.k[at], torch.tensor(torch.inf))
        return out

    monkeypatch.setattr(TritonOps, "rotate_and_store", broken)
    proof = proof_of(tmp_path, CheckedOps())
    assert proof.failed.keys() == {Operation.ROTATE_AND_STORE}


def test_too_little_memory_for_the_proof_leaves_plain_pytorch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save_tiny(tmp_path, "llama", vocab_size=300)

    def full(*args: Any, **kwargs: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(TritonOps, "linear", full)
    ops = CheckedOps()
    proof = proof_of(tmp_path, ops)
    assert not proof.holds and "too little memory" in proof.reason
    found = ops.capability(Use(Operation.LINEAR, FLOAT32))
    assert found is not None and found.by == "reference" and not found.batch_invariant
    assert "kernels are not used on this card: there is too little memory" in caplog.text


def test_a_kernel_that_breaks_the_card_ends_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing else could be computed in this process, by whomever."""
    save_tiny(tmp_path, "llama", vocab_size=300)

    def broken(*args: Any, **kwargs: Any) -> Tensor:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(TritonOps, "linear", broken)
    with pytest.raises(EngineError, match="MOEBIUS_CPU_ISA=reference") as told:
        proof_of(tmp_path, CheckedOps())
    assert "illegal memory access" in str(told.value) and "\n" not in str(told.value)


@pytest.mark.skipif(DEVICE == "cuda", reason="a fake stands in the card's place")
@pytest.mark.parametrize("why", ["is lost", "computes for ever"])
def test_no_memory_is_asked_back_of_a_card_that(
    why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That would fail, or never end, in the place of what is to be told."""
    save_tiny(tmp_path, "llama", vocab_size=300, num_hidden_layers=1)
    limit = LIMIT_SECONDS

    def broken(*args: Any, **kwargs: Any) -> Tensor:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(TritonOps, "linear", broken)
    if why == "computes for ever":
        monkeypatch.setattr(TritonOps, "linear", lambda *args: time.sleep(5))
        monkeypatch.setattr(proof_module, "require_idle", partial(require_idle, seconds=0.1))
        limit = 0.1
    with FakeCuda() as cuda:
        monkeypatch.setattr(torch.cuda, "empty_cache", broken)
        monkeypatch.setattr(cuda.default, "query", lambda: False)
        with pytest.raises(EngineError, match="MOEBIUS_CPU_ISA=reference"):
            proof_of(tmp_path, CheckedOps(), limit=limit, device="cuda")


def test_one_layer_of_each_kind_is_looked_at(tmp_path: Path) -> None:
    """gpt-oss has windows in every other layer, Gemma 4 layers that read another's keys."""
    save_tiny(tmp_path, "gpt_oss", vocab_size=300, num_hidden_layers=6)
    checkpoint = open_checkpoint(tmp_path)
    ops = ReferenceOps()
    decoder = decoder_of(checkpoint.config, ops, FLOAT32, device="meta")
    weights = checkpoint.plan_weights("float32", "cpu", frozenset(), checkpoint.sources_at(None))
    assert layers_of_each_kind(decoder, weights) == [0, 1]


def test_a_schedule_has_every_row_twice_in_other_company(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama", vocab_size=300, max_position_embeddings=4096)
    config = open_checkpoint(tmp_path).config
    decoder = decoder_of(config, ReferenceOps(), FLOAT32, device="meta")
    schedule = Schedule.of(decoder, None, ProofSizes())
    assert schedule.lengths[0] > 2 * 512, "several splits of attention"
    batches = {len(step) for step in schedule.steps if all(rows == 1 for _, rows in step)}
    assert {1, 2, 4, 8, 16, 32, 64} <= batches
    chunks = {rows for step in schedule.steps for _, rows in step}
    assert {1, 63, 64, 65, 512} <= chunks


def test_a_kernel_that_is_never_compiled_does_not_hold_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """All fall back, and what is computed afterwards is nothing of the thread that hangs; once it
    goes on it ends at its next operation, and changes nothing."""
    save_tiny(tmp_path, "llama", vocab_size=300)
    goes_on, ended = threading.Event(), threading.Event()
    linear = TritonOps.linear
    threads = []

    def hangs(self: TritonOps, *args: Any) -> Tensor:
        threads.append(threading.current_thread())
        goes_on.wait(60)
        ended.set()
        return linear(self, *args)

    monkeypatch.setattr(TritonOps, "linear", hangs)
    ops = CheckedOps()
    start = time.monotonic()
    proof = proof_of(tmp_path, ops, limit=0.5)
    assert time.monotonic() - start < 30 and threads[0] is not threading.current_thread()
    assert not proof.holds and proof.reason.startswith(
        "they were not proven within 0.5 s, when linear was looked at;"
    )
    assert f"kernels are not used on this card: {proof.reason}" in caplog.text
    for operation in Operation:
        found = ops.capability(Use(operation, FLOAT32))
        assert found is None or (found.by == "reference" and not found.batch_invariant)
    assert_computes_as_the_reference(tmp_path, ops)
    failed = dict(ops.failed)
    goes_on.set()
    assert ended.wait(10)
    threads[0].join(20)
    assert not threads[0].is_alive() and len(threads) == 1
    assert ops.failed == failed and ops._watch is None


def test_a_kernel_that_never_ends_on_the_card_ends_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever would be computed there waits for it."""

    class Stream:
        left = 2

        def query(self) -> bool:
            self.left -= 1
            return self.left < 0

    busy = Stream()
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: busy)
    require_idle(torch.device("cuda"), "linear", seconds=10)
    assert busy.left == -1
    busy.left = 10**6
    with pytest.raises(EngineError, match=r"does not end, of linear; start with MOEBIUS_CPU_ISA"):
        require_idle(torch.device("cuda"), "linear", seconds=0.1)
    require_idle(torch.device("cpu"), "linear", seconds=0.0)
