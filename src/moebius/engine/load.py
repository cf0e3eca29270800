"""From a model directory to a running engine: check, plan, load, reserve, warm up."""

import logging
import os
import secrets
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from moebius.config import EngineConfig, require
from moebius.engine.client import EngineInfo
from moebius.engine.engine import Engine
from moebius.engine.kv_cache import KVCache, bytes_per_token
from moebius.engine.memory import MemoryPlan, WeightBytes, available_memory, plan_memory
from moebius.engine.runner import Runner
from moebius.engine.trace import TraceWriter
from moebius.errors import ConfigError
from moebius.models.checkpoint import Checkpoint, fingerprint, open_checkpoint
from moebius.models.weights import load_decoder
from moebius.ops import Ops, select_ops
from moebius.schedule.blocks import BlockPool
from moebius.schedule.request import ServingLimits
from moebius.schedule.scheduler import Scheduler

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A checked checkpoint with everything decided that loading needs. Nothing is allocated yet."""

    checkpoint: Checkpoint
    ops: Ops
    device: torch.device
    dtype: torch.dtype
    plan: MemoryPlan


def prepare(directory: Path, config: EngineConfig) -> Prepared:
    """Read configuration and safetensors headers, check them, and plan the memory. Raises UsageError."""
    checkpoint = open_checkpoint(directory)
    why = checkpoint.config.unpublished
    require(not why, f"{directory} can be trained and measured, but not served: no published architecture has {why}")
    device = _device(config.device)
    cores = len(os.sched_getaffinity(0))
    if config.threads is not None and config.threads > cores:
        log.warning(
            "--threads %d is more than the %d cores there are; they will wait for each other", config.threads, cores
        )
    dtype = _dtype(config.dtype, checkpoint.dtype)
    ops = select_ops(device, dtype, config.threads)
    rows = checkpoint.plan_weights(_name(dtype), device.type)
    mapped = sum(row.nbytes for row in rows if row.mapped)
    total = sum(row.nbytes for row in rows)
    plan = plan_memory(
        checkpoint.config,
        config,
        WeightBytes(mapped, total - mapped, total // dtype.itemsize),
        dtype=_name(dtype),
        device=device.type,
        bytes_per_token=bytes_per_token(checkpoint.config, ops, config.block_size, dtype),
        available=torch.cuda.mem_get_info()[0] if device.type == "cuda" else available_memory(),
    )
    return Prepared(checkpoint, ops, device, dtype, plan)


def load_engine(
    directory: Path, config: EngineConfig, *, eos_ids: frozenset[int] = frozenset(), prepared: Prepared | None = None
) -> Engine:
    """Load the model and reserve what the plan says. Raises UsageError before anything is allocated."""
    prepared = prepared or prepare(directory, config)
    if prepared.ops.one_answer:
        # The kernels have a pool of their own; a second one that spins beside it costs both dearly on few cores.
        torch.set_num_threads(1)
    elif config.threads is not None:
        torch.set_num_threads(config.threads)
    plan, model_config = prepared.plan, prepared.checkpoint.config
    # A key of its own for each launch: nobody can aim for a prefix that another tenant has cached.
    pool = BlockPool(
        plan.num_blocks,
        plan.block_size,
        enable_prefix_caching=config.enable_prefix_caching,
        key=secrets.token_bytes(32),
    )
    scheduler = Scheduler(replace(config, max_model_len=plan.max_model_len), pool)
    trace = TraceWriter(config.trace, scheduler.config, scheduler.pool) if config.trace else None
    model = load_decoder(prepared.checkpoint, prepared.dtype, prepared.device, prepared.ops)
    cache = KVCache(
        model_config,
        prepared.ops,
        num_blocks=plan.num_blocks,
        block_size=plan.block_size,
        dtype=prepared.dtype,
        device=prepared.device,
    )
    runner = Runner(model, cache, prepared.device, config.max_num_batched_tokens)
    runner.warm_up()
    info = EngineInfo(
        limits=ServingLimits(
            model_config.vocab_size, plan.max_model_len, priorities=config.scheduling_policy == "priority"
        ),
        eos_ids=eos_ids,
        block_size=plan.block_size,
        num_blocks=plan.num_blocks,
        fingerprint=_fingerprint(prepared),
    )
    return Engine(runner, scheduler, info, trace=trace)


def _device(wish: str) -> torch.device:
    has_cuda = torch.cuda.is_available()
    if wish == "cuda" and not has_cuda:
        raise ConfigError(
            "--device cuda: torch finds no CUDA device; use --device cpu, or install a CUDA build of torch"
        )
    return torch.device("cuda" if wish == "cuda" or (wish == "auto" and has_cuda) else "cpu")


def _dtype(wish: str, stored: str) -> torch.dtype:
    if wish == "auto":
        wish = "float32" if stored == "float16" else stored
    return torch.bfloat16 if wish == "bfloat16" else torch.float32


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _fingerprint(prepared: Prepared) -> str:
    """Names weights, configuration and kernels; `-approx` where batch mates may change a bit (promise P1 is off)."""
    name = f"fp_{fingerprint(prepared.checkpoint)}_{prepared.ops.name}_{_name(prepared.dtype)}"
    return name if prepared.ops.one_answer else f"{name}-approx"
