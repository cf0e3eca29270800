"""The proof that kernels compute right, and the same for a row in any company, on the card itself.

A model's own layers, one of each kind and with their own weights, compute some thousand tokens:
once all at once, then in chunks and batches of many sizes, at other places of the cache. Meanwhile
an Inspector looks at each operation. What fails falls back to plain PyTorch. Where nothing fails,
that rows depend on themselves alone is a fact found on this card, and not a claim.
"""

import logging
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from moebius.engine.kv_cache import KVCache
from moebius.engine.limited import Overdue, within
from moebius.engine.plan_words import human_bytes
from moebius.engine.workspace import forward, head
from moebius.errors import EngineError, in_one_line
from moebius.models.decoder import Decoder, Layer
from moebius.models.encoder_decoder import EncoderDecoder, decoder_of
from moebius.models.store import PlannedWeight
from moebius.models.store.load import Loader
from moebius.ops.capability import Operation
from moebius.ops.prepared import own
from moebius.ops.steps import StateInputs, StepInputs
from moebius.ops.triton.checked import METHODS, CheckedOps
from moebius.ops.triton.inspector import Inspector
from moebius.ops.triton.sampling_proof import sampling_failure
from moebius.ops.triton.tiles import SIZED, ManyRows

log = logging.getLogger(__name__)

# Rows of one sequence in a step: beside, and on both sides of, every size of a tile.
_CHUNKS = (1, 2, 3, 5, 8, 13, 16, 17, 31, 33, 63, 64, 65, 128, 129, 257, 512, 1024, 2048)
# Sequences that bring one row each.
_BATCHES = (1, 2, 3, 4, 7, 8, 15, 16, 17, 32, 33, 64, 65, 128, 256)
# Rows of the first step, which has all of them, whose logits are looked at.
_LOGIT_ROWS = 64
_STATE_BYTES = 2**30
# Far more than compiling takes where nothing is wrong: a start must not be held for ever.
LIMIT_SECONDS = 300.0
# How long a card may go on with what was launched by then.
IDLE_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class ProofSizes:
    """How much is computed: at most so many tokens of a long sequence, in a step, and sequences."""

    long: int = 1536
    step: int = 2048
    sequences: int = 64


@dataclass(slots=True)
class Proof:
    """What was found: operations that fell back and why, and how long it took.

    reason     why nothing was proven at all
    few_alone  why tiles for many rows are not used, by operation
    """

    operations: frozenset[Operation] = frozenset()
    failed: dict[Operation, str] = field(default_factory=dict)
    seconds: float = 0.0
    reason: str = ""
    few_alone: dict[Operation, str] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        """All that the model computes was seen to be one answer in any company."""
        return bool(self.operations) and not (self.failed or self.reason)

    def tell(self) -> None:
        """In the log, a line for each thing that a reader can do something about."""
        for operation, reason in self.failed.items():
            log.warning(
                "the kernel for %s failed on this card: %s; plain PyTorch computes it",
                operation,
                reason,
            )
        if self.reason:
            log.warning("kernels are not used on this card: %s", self.reason)
            return
        for operation, reason in self.few_alone.items():
            log.warning(
                "the kernel for %s failed on this card with tiles for many rows: %s; prompts are "
                "computed with those for few",
                operation,
                reason,
            )
        log.info(
            "%d of %d operations were proven on this card, in %.1f s",
            len(self.operations - self.failed.keys()),
            len(self.operations),
            self.seconds,
        )


def prove(
    decoder: Decoder,
    loader: Loader,
    weights: Sequence[PlannedWeight],
    block_size: int,
    kv_dtype: torch.dtype | None = None,
    sizes: ProofSizes = ProofSizes(),
    limit: float = LIMIT_SECONDS,
) -> Proof:
    """Let the operations of `decoder`, which has no memory, compute what it is made of, and fall
    back where their kernels fail. weights: how each parameter will be held.

    limit: in seconds. What takes longer, as a kernel that is never compiled, is not waited for, and
    all operations fall back. Raises EngineError where a kernel has broken the card's context, or
    does not end on it, which no process can mend.
    """
    start = time.perf_counter()
    device = loader.device
    ops = own(decoder.ops, CheckedOps)
    attempt = Attempt(decoder, ops.for_trial(), loader, weights, block_size, kv_dtype, sizes)
    try:
        proof = within(limit, attempt.run)
    except Overdue:
        attempt.abandon()
        require_idle(device, attempt.at)
        proof = Proof(
            reason=f"they were not proven within {limit:g} s, when {attempt.at} was looked at; "
            "what was compiled stays for the next start, and MOEBIUS_CPU_ISA=reference asks for no "
            "proof"
        )
    except torch.AcceleratorError as error:
        raise EngineError(
            f"a kernel failed on this card and left it unusable: {in_one_line(error)}; start with "
            "MOEBIUS_CPU_ISA=reference for plain PyTorch"
        ) from error
    except torch.OutOfMemoryError:
        free = human_bytes(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else "none"
        proof = Proof(reason=f"there is too little memory to prove them, {free} are left")
    # Not of a card that is lost, or computes for ever: to give memory back is to wait for it.
    if device.type == "cuda":
        torch.cuda.empty_cache()
    proof.seconds = time.perf_counter() - start
    failed = dict.fromkeys(METHODS, proof.reason) if proof.reason else proof.failed
    for operation, reason in failed.items():
        ops.fall_back(operation, reason)
    ops.prove(proof.operations)
    if not (proof.reason or proof.few_alone or proof.failed.keys() & SIZED):
        ops.many_rows = ManyRows.WHERE_ENOUGH
    proof.tell()
    return proof


class Attempt:
    """A proof on a thread of its own, with operations that nobody else computes with.

    at: what it is about.
    """

    def __init__(
        self,
        decoder: Decoder,
        ops: CheckedOps,
        loader: Loader,
        weights: Sequence[PlannedWeight],
        block_size: int,
        kv_dtype: torch.dtype | None,
        sizes: ProofSizes,
    ) -> None:
        self._decoder = decoder
        self._ops = ops
        self._loader = loader
        self._weights = weights
        self._block_size = block_size
        self._kv_dtype = kv_dtype
        self._sizes = sizes
        self._trial: Trial | None = None
        self._abandoned = False

    @property
    def at(self) -> str:
        operation = None if self._trial is None else self._trial.inspector.at
        return "the model's layers" if operation is None else operation.value

    def abandon(self) -> None:
        """Let it end at its next operation, whenever that comes."""
        self._abandoned = True
        if self._trial is not None:
            self._trial.inspector.abandoned = True

    def run(self) -> Proof:
        if isinstance(self._decoder, EncoderDecoder):
            return Proof(reason="an encoder's layers have not been proven on any")
        model = _some_layers(self._decoder, self._ops, self._loader, self._weights)
        schedule = Schedule.of(self._decoder, self._kv_dtype, self._sizes)
        proof = self._try(model, schedule, few_alone=False)
        if proof.failed.keys() & SIZED:
            # Whatever it was, it may be the tiles for many rows.
            again = self._try(model, schedule, few_alone=True)
            again.few_alone = {
                operation: reason
                for operation, reason in proof.failed.items()
                if operation not in again.failed
            }
            proof = again
        return proof

    def _try(self, model: Decoder, schedule: "Schedule", *, few_alone: bool) -> Proof:
        device = self._loader.device
        self._trial = None  # whose cache makes room
        trial = Trial(model, schedule, device, self._block_size, self._kv_dtype, few_alone)
        self._trial = trial
        trial.inspector.abandoned |= self._abandoned
        failed = trial.run()
        return Proof(trial.operations, failed)


def require_idle(device: torch.device, at: str, seconds: float = IDLE_SECONDS) -> None:
    """EngineError where the card does not come to an end of what it computes."""
    if device.type != "cuda":
        return
    stream = torch.cuda.default_stream(device)
    last = time.monotonic() + seconds
    while not stream.query():
        if time.monotonic() > last:
            raise EngineError(
                f"a kernel runs on this card and does not end, of {at}; start with "
                "MOEBIUS_CPU_ISA=reference for plain PyTorch"
            )
        time.sleep(0.05)


def _some_layers(
    decoder: Decoder, ops: CheckedOps, loader: Loader, weights: Sequence[PlannedWeight]
) -> Decoder:
    """The model with one layer of each kind, and their weights on the device."""
    numbers = layers_of_each_kind(decoder, weights)
    model = decoder_of(decoder.config, ops, decoder.dtype, device="meta")
    wanted = tuple(f"layers.{number}." for number in numbers)
    loader.fill_some(model, lambda name: not name.startswith("layers.") or name.startswith(wanted))
    model.layers = nn.ModuleList(model.layers[number] for number in numbers)
    return model


def layers_of_each_kind(decoder: Decoder, weights: Sequence[PlannedWeight]) -> list[int]:
    """The first layer of each kind: of each spec, with weights in the same formats. A layer that
    reads another's keys comes with that one."""
    formats: dict[int, set[tuple[str, str]]] = {}
    for weight in weights:
        part, _, name = weight.name.removeprefix("layers.").partition(".")
        if weight.name.startswith("layers."):
            kind = ".".join(each for each in name.split(".") if not each.isdigit())
            formats.setdefault(int(part), set()).add((kind, weight.format))
    first: dict[object, int] = {}
    for number, spec in enumerate(decoder.config.layers):
        first.setdefault((spec, frozenset(formats.get(number, ()))), number)
    chosen = set(first.values())
    for number in first.values():
        layer = decoder.layers[number]
        assert isinstance(layer, Layer)
        chosen.add(getattr(layer.self_attn, "layer", number))
    return sorted(chosen)


@dataclass(frozen=True, slots=True)
class Schedule:
    """Steps, each of (sequence, rows); all sequences together have the lengths that these add up
    to."""

    steps: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def lengths(self) -> list[int]:
        found = Counter[int]()
        for step in self.steps:
            for sequence, rows in step:
                found[sequence] += rows
        return [found[sequence] for sequence in range(len(found))]

    @classmethod
    def of(cls, decoder: Decoder, kv_dtype: torch.dtype | None, sizes: ProofSizes) -> "Schedule":
        """One long sequence in chunks of many sizes, with others beside it; batches of one row
        each; and the long one's last tokens, one by one."""
        config = decoder.config
        state = sum(spec.bytes_per_state for spec in config.caches(decoder.dtype, kv_dtype))
        most = min(sizes.sequences, max(2, _STATE_BYTES // (2 * state)) if state else 2**10)
        longest = min(sizes.long, config.context - 3)
        steps: list[tuple[tuple[int, int], ...]] = []
        total = 0
        for number, rows in enumerate(_CHUNKS):
            if total + rows > longest or rows > sizes.step:
                break
            beside = [(1 + each, 1) for each in range(min(number, most))]
            steps.append(((0, rows), *beside))
            total += rows
        for count in _BATCHES:
            if count <= most:
                steps.append(tuple((1 + each, 1) for each in range(count)))
        steps += [((0, 1),)] * 3
        return cls(tuple(steps))


class Trial:
    """A schedule's tokens through a model, all at once and step by step.

    Products have tiles for few rows and for many: with the latter, but where there are to be the
    former alone, all is computed at once, and every other step.
    """

    def __init__(
        self,
        model: Decoder,
        schedule: Schedule,
        device: torch.device,
        block_size: int,
        kv_dtype: torch.dtype | None,
        few_alone: bool = False,
    ) -> None:
        self._model = model
        self._sizes = [ManyRows.ALWAYS, ManyRows.NEVER]
        if few_alone:
            self._sizes = [ManyRows.NEVER, ManyRows.NEVER]
        self._schedule = schedule
        self._device = device
        self._lengths = schedule.lengths
        rng = random.Random(0)
        vocab = model.config.vocab_size
        self._tokens = [[rng.randrange(vocab) for _ in range(n)] for n in self._lengths]
        self._starts = [sum(self._lengths[:number]) for number in range(len(self._lengths))]
        specs = model.config.caches(model.dtype, kv_dtype)
        self._blocks = [-(-length // block_size) for length in self._lengths]
        cache = KVCache(
            specs, model.ops, num_blocks=0, block_size=block_size, device=torch.device("meta")
        )
        self._groups = len(cache.layout.windows)
        each = sum(self._blocks) * self._groups
        self._cache = KVCache(
            specs,
            model.ops,
            num_blocks=2 * each,
            block_size=block_size,
            device=device,
            num_states=2 * len(self._lengths) if any(spec.state for spec in specs) else 0,
        )
        # Two places for everything: in order, and scattered.
        self._places = [list(range(each)), rng.sample(range(each, 2 * each), each)]
        self.inspector = Inspector(sum(self._lengths))
        self.operations: frozenset[Operation] = frozenset()

    def run(self) -> dict[Operation, str]:
        """What failed, and why."""
        ops = self._model.ops
        assert isinstance(ops, CheckedOps)
        whole = tuple(enumerate(self._lengths))
        ops.many_rows = self._sizes[0]
        logits_LV = self._step(ops, whole, [0] * len(whole), 0)
        self.inspector.compare()
        computed = [0] * len(whole)
        for number, step in enumerate(self._schedule.steps, 1):
            ops.many_rows = self._sizes[number % 2]
            self._step(ops, step, computed, 1)
            for sequence, rows in step:
                computed[sequence] += rows
        failed = dict(self.inspector.failed)
        reason = sampling_failure(ops, logits_LV[:8].contiguous())
        if reason:
            failed[Operation.SAMPLING] = reason
        self.operations = frozenset(self.inspector.seen | {Operation.SAMPLING})
        return failed

    def _step(
        self,
        ops: CheckedOps,
        step: Sequence[tuple[int, int]],
        computed: Sequence[int],
        place: int,
    ) -> torch.Tensor:
        """Compute a step, watched; the logits of its first rows."""
        rows = [
            self._starts[sequence] + computed[sequence] + each
            for sequence, count in step
            for each in range(count)
        ]
        inputs = self._inputs(step, computed, place)
        if inputs.states is not None:
            self._cache.clear_states(inputs.states.cleared)
        self.inspector.begin(rows, self._device)
        ops.watched(self.inspector)
        try:
            hidden_TD = forward(self._model, self._cache, inputs)
            few = min(len(rows), _LOGIT_ROWS)
            self.inspector.narrow(few)
            return head(self._model, hidden_TD, torch.arange(few, device=self._device))
        finally:
            ops.watched(None)

    def _inputs(
        self, step: Sequence[tuple[int, int]], computed: Sequence[int], place: int
    ) -> StepInputs:
        tables = [
            [self._table(sequence, group, place) for sequence, _ in step]
            for group in range(self._groups)
        ]
        states = None
        if self._cache.num_states:
            slots = [2 * sequence + place for sequence, _ in step]
            new = [2 * sequence + place for sequence, _ in step if not computed[sequence]]
            states = StateInputs(slots, new, (), ())
        return StepInputs.build(
            [self._tokens[s][computed[s] : computed[s] + rows] for s, rows in step],
            [computed[sequence] for sequence, _ in step],
            tables[0] if tables else None,
            self._cache.block_size,
            self._device,
            others=tables[1:],
            states=states,
        )

    def _table(self, sequence: int, group: int, place: int) -> list[int]:
        """A sequence's blocks of a group of layers."""
        first = sum(self._blocks[:sequence]) * self._groups + self._blocks[sequence] * group
        return self._places[place][first : first + self._blocks[sequence]]
