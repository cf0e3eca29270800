"""What a device really has left for the cache, beside weights and what the largest step took.

The plan is made before, of what libraries say and of estimates: what a driver, a library's
workspaces and other processes take is seen here.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from moebius.engine.config import EngineConfig
from moebius.engine.kv_cache import KVCache
from moebius.engine.memory import MemoryPlan, with_cache_of
from moebius.engine.plan_words import human_bytes
from moebius.engine.runner import Runner
from moebius.engine.workspace import StepRows
from moebius.errors import MemoryPlanError
from moebius.models.decoder import Decoder
from moebius.ops.cache_spec import CacheSpec
from moebius.ops.cuda import told_by_device
from moebius.ops.steps import StateInputs, StepInputs

log = logging.getLogger(__name__)

# Of the device's memory, left alone: what an allocator cannot use for want of one piece.
_UNUSED = 0.01


class DeviceMemory(ABC):
    """How much of a device's memory there is, and what was taken of it."""

    total: int

    @abstractmethod
    def free(self) -> int:
        """Bytes that could be allocated now."""

    @abstractmethod
    def watch(self) -> Callable[[], int]:
        """From now on; what is returned says how many bytes were needed beside those of now."""


class CudaMemory(DeviceMemory):
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.total = torch.cuda.mem_get_info(device)[1]

    def free(self) -> int:
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self._device)[0]

    def watch(self) -> Callable[[], int]:
        before = torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)

        def needed() -> int:
            torch.cuda.synchronize(self._device)
            return max(0, torch.cuda.max_memory_allocated(self._device) - before)

        return needed


def fitted(
    plan: MemoryPlan,
    memory: DeviceMemory,
    largest_step: Callable[[], None],
    *,
    graphs: int = 0,
    asked: int | None = None,
) -> MemoryPlan:
    """The plan with the workspace that the largest step took, and no larger a cache than fits.

    graphs: bytes that captured steps will take. asked: what the operator wants for the cache; None:
    what there is. Raises MemoryPlanError, with the numbers, where that or one sequence does not
    fit.
    """
    needed = memory.watch()
    largest_step()
    workspace = needed()
    free = memory.free()
    room = free - workspace - graphs - int(_UNUSED * memory.total)
    planned = plan.kv_cache + plan.states
    plan = replace(plan, workspace=workspace + graphs)
    if planned <= room:
        return plan
    numbers = (
        f"once weights ({human_bytes(plan.weights.total)}) are on the device, "
        f"{human_bytes(free)} are free, of which the largest step takes {human_bytes(workspace)}"
    )
    if asked is not None:
        raise MemoryPlanError(
            f"a KV cache of {human_bytes(planned)} does not fit: {numbers}; lower "
            f"--kv-cache-memory-bytes to {max(room, 0)}, or free memory of the device"
        )
    if room <= 0:
        raise MemoryPlanError(
            f"there is no room for a KV cache: {numbers}; lower --max-num-batched-tokens, or free "
            "memory of the device"
        )
    log.warning("the KV cache is %s, less than planned: %s", human_bytes(room), numbers)
    return with_cache_of(plan, room)


def largest_step(
    model: Decoder,
    specs: tuple[CacheSpec, ...],
    device: torch.device,
    rows: StepRows,
    block_size: int,
) -> Callable[[], None]:
    """What makes a step of as many rows as there may be, of sequences as long as can be, and as
    many logits, over a cache of its own. It counts that cache as workspace, which is small."""

    def run() -> None:
        length = min(rows.tokens, model.config.context)
        sequences = -(-rows.tokens // length)
        blocks = -(-length // block_size)
        recurs = any(spec.state for spec in specs)
        # Each group of layers has all blocks: what lies there is nobody's.
        cache = KVCache(
            specs,
            model.ops,
            num_blocks=blocks,
            block_size=block_size,
            device=device,
            num_states=sequences if recurs else 0,
        )
        slots = range(sequences)
        states = StateInputs(slots, slots, (), ()) if recurs else None
        tables = [range(blocks)] * sequences
        runner = Runner(model, cache, device, replace(rows, sequences=0))
        runner.execute(
            StepInputs.build(
                [[0] * length] * sequences,
                [0] * sequences,
                tables,
                block_size,
                device,
                others=[tables] * (len(cache.layout.windows) - 1),
                states=states,
            )
        )
        logits_LV = runner.logits(range(min(rows.logits, length * sequences)))
        model.ops.argmax(logits_LV)

    return run


def fit_to_device(
    plan: MemoryPlan,
    model: Decoder,
    specs: tuple[CacheSpec, ...],
    device: torch.device,
    rows: StepRows,
    config: EngineConfig,
) -> MemoryPlan:
    """The plan as `fitted` makes it on a CUDA device; on a CPU as it is, which reserves nothing."""
    if device.type != "cuda":
        return plan
    step = largest_step(model, specs, device, rows, plan.block_size)
    with told_of_memory(plan, device):
        return fitted(
            plan,
            CudaMemory(device),
            step,
            graphs=plan.graphs,
            asked=config.kv_cache_memory_bytes,
        )


@contextmanager
def told_of_memory(plan: MemoryPlan, device: torch.device) -> Iterator[None]:
    """Within it too little memory of a device is the operator's to know, in one line."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        said = told_by_device(error, device, human_bytes)
        raise MemoryPlanError(
            f"the device's memory is too small while the model is loaded ({said}): weights "
            f"take {human_bytes(plan.weights.total)}, the KV cache "
            f"{human_bytes(plan.kv_cache + plan.states)}, steps {human_bytes(plan.workspace)}; "
            "lower --kv-cache-memory-bytes or --max-num-batched-tokens, or free memory there"
        ) from error
