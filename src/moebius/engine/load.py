"""From a model directory to a running engine: check, plan, load, reserve, warm up."""

import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from moebius import machine
from moebius.engine.client import EngineInfo
from moebius.engine.config import EngineConfig
from moebius.engine.engine import Engine
from moebius.engine.kv_cache import (
    KVCache,
    block_bytes,
    lay_out,
    request_bytes,
    scratch_states,
    state_bytes,
)
from moebius.engine.memory import (
    CacheSizes,
    MemoryPlan,
    WeightBytes,
    human_bytes,
    logit_rows,
    plan_memory,
)
from moebius.engine.runner import Runner
from moebius.engine.trace import TraceWriter
from moebius.engine.workspace import StepRows, Workspace, plan_workspace
from moebius.errors import ConfigError
from moebius.models.decoder import Decoder
from moebius.models.store import Checkpoint, PlannedWeight, fingerprint, open_checkpoint
from moebius.models.store.load import load_decoder
from moebius.models.uses import check_served
from moebius.ops import Ops, select_ops
from moebius.ops.cache_spec import CacheSpec
from moebius.ops.threads import TorchThreads, default_threads
from moebius.ops.weights import dtype_name
from moebius.schedule.blocks import BlockPool
from moebius.schedule.params import ServingLimits
from moebius.schedule.scheduler import Scheduler

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A checked checkpoint with everything decided that loading needs. Nothing is allocated yet."""

    checkpoint: Checkpoint
    ops: Ops
    device: torch.device
    dtype: torch.dtype
    weights: list[PlannedWeight]
    plan: MemoryPlan
    threads: int
    workspace: Workspace
    decoder: Decoder
    """Without memory; the first engine that is made of this fills it."""

    @property
    def batch_invariant(self) -> bool:
        """Promise P1: told by the operations that this model uses."""
        return self.workspace.batch_invariant(self.ops)

    def rows(self) -> list[tuple[str, str, str]]:
        """The plan as a table: (what, how much, remark)."""
        return [
            *self.plan.rows(),
            ("threads", str(self.threads), f"{machine.processors():g} processors may be used"),
        ]


def prepare(directory: Path, config: EngineConfig) -> Prepared:
    """Read configuration and safetensors headers, check them, and plan the memory. Raises
    UsageError."""
    checkpoint = open_checkpoint(directory)
    why = checkpoint.config.unpublished
    if why:
        raise ConfigError(
            f"{directory} can be trained and measured, but not served: no published architecture "
            f"has {why}"
        )
    device = _device(config.device)
    cores = machine.threads()
    if config.threads is not None and config.threads > cores:
        log.warning(
            "--threads %d is more than the %d cores that we may use, CPU quota included; they will "
            "wait for each other",
            config.threads,
            cores,
        )
    dtype = choose_dtype(config.dtype, checkpoint.dtype, device.type)
    ops = select_ops(device, dtype, config.threads)
    check_served(checkpoint.config, dtype, ops)
    weights = checkpoint.plan_weights(dtype_name(dtype), device.type, ops.formats(dtype))
    available, available_of = _available(device)
    decoder = Decoder(checkpoint.config, ops, dtype, device="meta")
    workspace = plan_workspace(
        decoder,
        config.block_size,
        step_rows(config),
        config.max_model_len or checkpoint.config.context,
    )
    plan = plan_memory(
        checkpoint.config,
        config,
        _weight_bytes(weights, checkpoint.dtype),
        dtype=dtype_name(dtype),
        device=device.type,
        cache=_cache_sizes(checkpoint.config.caches(dtype), ops, config.block_size),
        available=available,
        available_of=available_of,
        recorded=workspace.nbytes if workspace.recorded else None,
    )
    threads = config.threads or cores
    return Prepared(checkpoint, ops, device, dtype, weights, plan, threads, workspace, decoder)


def _weight_bytes(weights: list[PlannedWeight], stored: str) -> WeightBytes:
    mapped = sum(weight.nbytes for weight in weights if weight.mapped)
    copied = sum(weight.nbytes for weight in weights if not weight.mapped)
    return WeightBytes(mapped, copied, sum(weight.count for weight in weights), stored)


def load_engine(
    directory: Path,
    config: EngineConfig,
    *,
    eos_ids: frozenset[int] = frozenset(),
    prefix_key: bytes | None = None,
    prepared: Prepared | None = None,
) -> Engine:
    """Load the model and reserve what the plan says. Raises UsageError before anything is
    allocated.

    prefix_key: the launch's, by which the front hashes prompts too; None: one that nobody knows.
    """
    prepared = prepared or prepare(directory, config)
    plan = prepared.plan
    name = _fingerprint(prepared)
    # A key of its own for each launch: nobody can aim for a prefix that another tenant has cached.
    pool = BlockPool(
        plan.num_blocks,
        plan.block_size,
        groups=plan.groups,
        enable_prefix_caching=config.enable_prefix_caching,
        key=prefix_key or secrets.token_bytes(32),
        namespace=name.encode(),
    )
    scheduler = Scheduler(replace(config, max_model_len=plan.max_model_len), pool)
    trace = TraceWriter(config.trace, scheduler.config, scheduler.pool) if config.trace else None
    threads = _torch_threads(prepared, config)
    try:
        with TorchThreads(threads):
            runner = _load_runner(prepared, config)
    except BaseException:
        if trace:
            trace.abandon()
        raise
    info = EngineInfo(
        limits=ServingLimits(
            prepared.checkpoint.config.vocab_size,
            plan.max_model_len,
            priorities=config.scheduling_policy == "priority",
        ),
        eos_ids=eos_ids,
        block_size=plan.block_size,
        num_blocks=plan.num_blocks,
        fingerprint=name,
        prefix_caching=config.enable_prefix_caching,
    )
    return Engine(runner, scheduler, info, trace=trace, torch_threads=threads)


def _load_runner(prepared: Prepared, config: EngineConfig) -> Runner:
    """Map or copy the weights, reserve the cache, and make the first steps."""
    plan = prepared.plan
    model = load_decoder(
        prepared.checkpoint,
        prepared.dtype,
        prepared.device,
        prepared.ops,
        into=prepared.decoder,
    )
    states = plan.groups.states
    cache = KVCache(
        prepared.checkpoint.config.caches(prepared.dtype),
        prepared.ops,
        num_blocks=plan.num_blocks,
        block_size=plan.block_size,
        device=prepared.device,
        num_states=0 if states is None else states.num_slots,
    )
    runner = Runner(model, cache, prepared.device, step_rows(config), prepared.workspace)
    runner.warm_up()
    return runner


def step_rows(config: EngineConfig) -> StepRows:
    """How many rows memory is planned for, and recorded for."""
    return StepRows(config.max_num_batched_tokens, logit_rows(config))


def _cache_sizes(specs: Sequence[CacheSpec], ops: Ops, block_size: int) -> CacheSizes:
    return CacheSizes(
        windows=lay_out(specs).windows,
        block=block_bytes(specs, ops, block_size),
        state=state_bytes(specs),
        scratch=scratch_states(specs),
        request=request_bytes(specs),
    )


def _torch_threads(prepared: Prepared, config: EngineConfig) -> int | None:
    """What torch computes a step with; None leaves it alone.

    Beside the kernels, which have threads of their own, a little of sampling is torch's: a second
    pool that spins for it costs both dearly on few cores.
    """
    if prepared.device.type != "cpu":
        return None
    if prepared.ops.own_threads:
        return 1
    return config.threads or default_threads()


def _device(wish: str) -> torch.device:
    has_cuda = torch.cuda.is_available()
    if wish == "cuda" and not has_cuda:
        raise ConfigError(
            "--device cuda: torch finds no CUDA device; use --device cpu, or install a CUDA build "
            "of torch"
        )
    return torch.device("cuda" if wish == "cuda" or (wish == "auto" and has_cuda) else "cpu")


def _available(device: torch.device) -> tuple[int, str]:
    """Bytes that are left where the engine will be, and of what."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        return free, f"the device's {human_bytes(total)}"
    memory = machine.memory()
    return memory.available, f"the {memory.owner}'s {human_bytes(memory.limit)}"


def choose_dtype(wish: str, stored: str, device: str) -> torch.dtype:
    """What is computed in and the KV cache held in; auto is the checkpoint's own.

    A CPU has no fast float16: there float32 takes its place, which holds every float16 exactly, so
    that the weights can stay as they are.
    """
    if wish == "auto":
        wish = "float32" if stored == "float16" and device == "cpu" else stored
    return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[wish]


def _fingerprint(prepared: Prepared) -> str:
    """Names weights, configuration and kernels; `-approx` where batch mates may change a bit
    (promise P1 is off)."""
    name = f"fp_{fingerprint(prepared.checkpoint)}_{prepared.ops.name}_{dtype_name(prepared.dtype)}"
    return name if prepared.batch_invariant else f"{name}-approx"
