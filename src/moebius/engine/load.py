"""From a model directory to a running engine: check, plan, load, reserve, warm up."""

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from moebius import machine
from moebius.engine.cache_sizes import CacheSizes
from moebius.engine.config import EngineConfig
from moebius.engine.constraints import constraints_of_model
from moebius.engine.devices import prove_on_device
from moebius.engine.disk_directory import launch_key
from moebius.engine.disk_memory import disk_memory
from moebius.engine.disk_start import disk_tier, open_disk
from moebius.engine.drafting import scheduler_for
from moebius.engine.dtypes import choose_dtype, choose_kv_dtype
from moebius.engine.encoders import as_asked, shares_prefixes
from moebius.engine.engine import Engine
from moebius.engine.expert_share import ExpertShare, part_of_host
from moebius.engine.fitting import fit_to_device, told_of_memory
from moebius.engine.garbage import uncollected
from moebius.engine.host_experts import (
    ExpertOrder,
    crossing_rows,
    least_cache,
    most_on_device,
    on_host,
    placement_name,
)
from moebius.engine.host_plan import HostPlan, rows_bytes
from moebius.engine.info import engine_info
from moebius.engine.kv_cache import (
    KVCache,
    block_bytes,
    lay_out,
    scratch_states,
    state_bytes,
)
from moebius.engine.memory import MemoryPlan, plan_memory
from moebius.engine.moves import ExpertMoves
from moebius.engine.place import NodeMemory
from moebius.engine.prepared import Prepared
from moebius.engine.rank import RankEngine
from moebius.engine.runner import Runner
from moebius.engine.shared_head import SHARED_ROWS
from moebius.engine.step_memory import grammar_bytes, graph_bytes, graph_pieces, logit_rows
from moebius.engine.steps_ahead import steps_ahead
from moebius.engine.target import HERE, Target
from moebius.engine.trace import TraceWriter
from moebius.engine.weight_bytes import common_bytes, count_weights, in_memory
from moebius.engine.workspace import StepRows, Workspace, plan_workspace
from moebius.errors import ConfigError
from moebius.models.decoder import Decoder
from moebius.models.encoder_decoder import decoder_of
from moebius.models.key_offsets import key_offsets
from moebius.models.layout import Source
from moebius.models.store import Checkpoint, PlannedWeight, fingerprint, open_checkpoint
from moebius.models.store.load import Loader
from moebius.models.uses import check_served
from moebius.moe.on_host import HostExperts
from moebius.moe.ranks import ExpertRank
from moebius.ops import Ops, select_ops
from moebius.ops.cache_spec import CacheSpec
from moebius.ops.formats import BLOCK_FORMATS, dtype_name
from moebius.ops.threads import TorchThreads, default_threads
from moebius.parallel.alone import Alone
from moebius.parallel.exchange import ExchangeSpec
from moebius.progress import bytes_bar
from moebius.quantize.cached import Quantized
from moebius.schedule.blocks import BlockPool
from moebius.text import Tokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Chosen:
    """What a plan is made of, but for which experts lie where; fields are as Prepared's."""

    checkpoint: Checkpoint
    config: EngineConfig
    target: Target
    ops: Ops
    device: torch.device
    dtype: torch.dtype
    kv_dtype: torch.dtype
    share: ExpertShare | None = None
    quantized: Quantized | None = None

    @property
    def ranks(self) -> ExpertRank | None:
        return None if self.share is None else self.share.of(self.checkpoint.config, self.config)

    @property
    def memory(self) -> NodeMemory | None:
        """The nodes that its weights are copied to."""
        share = self.share
        return None if share is None or not share.memory_apart else share.memory


@uncollected()
def prepare(
    directory: Path,
    config: EngineConfig,
    share: ExpertShare | None = None,
    *,
    ahead: bool = False,
    target: Target = HERE,
) -> Prepared:
    """Check a model and plan its memory, by the heads of its files alone. Raises UsageError.

    share: the rank to plan for; None: of config.ranks the one that has least memory, as if all were
    on this host. ahead: an engine will be made of it; weights that there is room for may be read,
    and kernels of a device are proven there. target: the machine that it would be made on.
    """
    prepared = _planned(directory, config, share, ahead=ahead, target=target)
    if not ahead or not prepared.ops.name.startswith("triton"):
        return prepared
    if prepared.quantized is not None:
        prepared.quantized.make(bytes_bar)
    proof = prove_on_device(
        prepared.decoder, prepared.loader, prepared.weights, config.block_size, prepared.kv_dtype
    )
    return replace(prepared, proven=proof)


def _planned(
    directory: Path,
    config: EngineConfig,
    share: ExpertShare | None,
    *,
    ahead: bool,
    target: Target,
) -> Prepared:
    if share is None and config.ranks > 1:
        share, config = ExpertShare.on_this_host(directory, config)
    checkpoint = _published(directory, config.max_model_len)
    quantized = Quantized.by_name(checkpoint, config.quantization)
    checkpoint = as_asked(checkpoint if quantized is None else quantized.checkpoint, config)
    device = _device(target, config, share)
    dtype = choose_dtype(config.dtype, checkpoint.dtype, device.type)
    kv_dtype = choose_kv_dtype(config.kv_cache_dtype, dtype)
    ops = _ops(checkpoint, config, device, dtype, here=target.device_memory is None)
    check_served(checkpoint.config, dtype, ops, kv_dtype)
    chosen = _Chosen(
        checkpoint, config, target, ops, device, dtype, kv_dtype, share=share, quantized=quantized
    )
    if config.device_experts is None:
        return _prepared(chosen, ahead=ahead)
    return _beside_host(chosen, config.device_experts)


def _beside_host(chosen: _Chosen, wanted: int | Literal["auto"]) -> Prepared:
    """With `wanted` experts of each layer on the device, and the others in the host's memory."""
    model = chosen.checkpoint.config
    config = chosen.config
    order = ExpertOrder.of(model, config)
    ops = _ops(chosen.checkpoint, config, torch.device("cpu"), chosen.dtype)
    most = crossing_rows(model, config, chosen.dtype)

    def planned(count: int, least: int = 0) -> Prepared:
        host = on_host(model, order, count, ops, most)
        return replace(_prepared(chosen, host, least=least), placed=order.words)

    if wanted == "auto":
        bare = planned(0).plan
        cache = least_cache(bare, config)
        count = most_on_device(bare, _device_sizes(chosen, order), cache)
        found = planned(count, least=cache)
    else:
        found = planned(wanted)
    if found.plan.host is not None:
        found.plan.host.check()
    return found


def _device_sizes(chosen: _Chosen, order: ExpertOrder) -> list[int]:
    """Bytes that 0, 1, 2, ... experts of each layer take of the device."""
    checkpoint = chosen.checkpoint
    formats = chosen.ops.formats(chosen.dtype)
    dtype = dtype_name(chosen.dtype)
    weights = checkpoint.plan_weights(dtype, chosen.device.type, formats)
    sizes = order.sizes(checkpoint.sources, weights)
    # With all of them there, steps are whole graphs, and of more sizes.
    model = checkpoint.config
    in_pieces = graph_bytes(model, chosen.config, graph_pieces(model, whole=False))
    sizes[-1] += max(0, graph_bytes(model, chosen.config) - in_pieces)
    return sizes


def _prepared(
    chosen: _Chosen, host: HostExperts | None = None, *, ahead: bool = False, least: int = 0
) -> Prepared:
    """With these experts in the host's memory, and at `least` so many bytes of KV cache, as far as
    there is room."""
    checkpoint = chosen.checkpoint
    config = chosen.config
    device = chosen.device
    ranks = chosen.ranks
    near = chosen.memory is not None
    sources = checkpoint.sources_at(ranks)
    formats = chosen.ops.formats(chosen.dtype)
    dtype = dtype_name(chosen.dtype)
    weights = checkpoint.plan_weights(dtype, device.type, formats, sources, near=near, host=host)
    here = in_memory(sources, weights, on_host=False)
    # Of experts on disk those in the host's memory are, where there are some.
    settings = config if host is None else replace(config, mmap_cold=False)
    weight_bytes = count_weights(*here, checkpoint.dtype, settings, ranks)
    weight_bytes = replace(weight_bytes, nodes=chosen.memory.nodes if chosen.memory else ())
    available, available_of = _room(chosen, sources, weights)
    loader = Loader(checkpoint, device, near=near, cold=config.mmap_cold)
    if ahead and chosen.quantized is None and weight_bytes.total <= available:
        loader.read_ahead(ranks)
    decoder = decoder_of(checkpoint.config, chosen.ops, chosen.dtype, "meta", ranks, host)
    workspace = _workspace(decoder, config, chosen.kv_dtype)
    specs = checkpoint.config.caches(chosen.dtype, chosen.kv_dtype)
    pieces = graph_pieces(checkpoint.config, whole=host is None and ranks is None)
    plan = plan_memory(
        checkpoint.config,
        config,
        weight_bytes,
        dtype=dtype,
        device=device.type,
        kv_dtype=dtype_name(chosen.kv_dtype),
        cache=_cache_sizes(specs, chosen.ops, config.block_size),
        available=available,
        available_of=available_of,
        step=workspace.memory._replace(pieces=pieces if device.type == "cuda" else 0),
        ranks=1 if chosen.share is None else chosen.share.ranks,
        least=least,
    )
    if host is not None:
        plan = replace(plan, host=_host_plan(chosen, host, sources, weights, plan.cache))
    return Prepared(
        checkpoint=checkpoint,
        ops=chosen.ops,
        device=device,
        dtype=chosen.dtype,
        kv_dtype=chosen.kv_dtype,
        weights=weights,
        plan=plan,
        threads=_threads(config),
        workspace=workspace,
        decoder=decoder,
        loader=loader,
        quantized=chosen.quantized,
        speculative=config.speculative,
    )


def _host_plan(
    chosen: _Chosen,
    host: HostExperts,
    sources: Sequence[Source],
    weights: Sequence[PlannedWeight],
    cache: CacheSizes,
) -> HostPlan:
    """What the host has of it."""
    model = chosen.checkpoint.config
    available, available_of = chosen.target.on_host()
    there = in_memory(sources, weights, on_host=True)
    return HostPlan(
        count_weights(*there, chosen.checkpoint.dtype, chosen.config, None),
        rows_bytes(model, host.most),
        grammar_bytes(model.vocab_size, "cpu"),
        disk_memory(cache, chosen.config),
        available,
        available_of,
    )


def _workspace(decoder: Decoder, config: EngineConfig, kv_dtype: torch.dtype) -> Workspace:
    context = config.max_model_len or decoder.config.context
    return plan_workspace(decoder, config.block_size, step_rows(config), context, kv_dtype)


def _ops(
    checkpoint: Checkpoint,
    config: EngineConfig,
    device: torch.device,
    dtype: torch.dtype,
    *,
    here: bool = True,
) -> Ops:
    """Where there are matrices whose products have the same bits on every processor, all others'
    are to have them too."""
    blocks = {each.name for each in BLOCK_FORMATS}
    some = any(tensor.format in blocks for tensor in checkpoint.tensors.values())
    ordered = config.activations == "int8" and some
    return select_ops(device, dtype, config.threads, config.activations, ordered=ordered, here=here)


def _threads(config: EngineConfig) -> int:
    cores = machine.threads()
    if config.threads is not None and config.threads > cores:
        log.warning(
            "--threads %d is more than the %d cores that may be used", config.threads, cores
        )
    return config.threads or cores


def _room(
    chosen: _Chosen, sources: Sequence[Source], weights: Sequence[PlannedWeight]
) -> tuple[int, str]:
    """Bytes that an engine with these weights may take, and of what."""
    available, of = chosen.target.available(chosen.device)
    if chosen.share is None or chosen.device.type != "cpu":
        return available, of
    return part_of_host(available, of, chosen.share, common_bytes(sources, weights))


def check_ranks(directory: Path, config: EngineConfig) -> None:
    """Raises ConfigError where this model has not the experts that config.ranks are to share."""
    if config.ranks > 1:
        ExpertShare(0, config.ranks).of(open_checkpoint(directory).config, config)


def _published(directory: Path, length: int | None) -> Checkpoint:
    """The checkpoint in a directory. Raises ConfigError for what can be trained alone."""
    checkpoint = open_checkpoint(directory)
    why = checkpoint.config.unpublished
    if why:
        raise ConfigError(
            f"{directory} can be trained and measured, but not served: no published architecture "
            f"has {why}"
        )
    return replace(checkpoint, config=checkpoint.config.at_length(length))


def load_engine(
    directory: Path,
    config: EngineConfig,
    *,
    eos_ids: frozenset[int] = frozenset(),
    prefix_key: bytes | None = None,
    prepared: Prepared | None = None,
    tokenizer: Callable[[], Tokenizer] | None = None,
) -> Engine:
    """Load the model and reserve what the plan says. Raises UsageError before anything is
    allocated.

    prefix_key: the launch's, by which the front hashes prompts too, so that nobody can aim for a
    prefix that another tenant has cached; None: one that nobody knows, or the disk's.
    tokenizer: reads the one that grammars are matched by, when the first comes; None: the model's.
    """
    prepared = prepared or prepare(directory, config, ahead=True)
    model = prepared.checkpoint.config
    if prepared.quantized is not None:
        prepared.quantized.make(bytes_bar)
    name = _fingerprint(prepared)
    key = prefix_key or launch_key(config)
    threads = _torch_threads(prepared, config)
    with ExitStack() as undo:
        store = open_disk(config, model, key, prepared.decoder.ranks)
        undo.callback(store.close if store else bool)
        filled, plan = _filled(prepared, config)
        prepared = replace(prepared, plan=plan)
        pool = BlockPool(
            plan.num_blocks,
            plan.block_size,
            groups=plan.groups,
            enable_prefix_caching=shares_prefixes(model, config),
            key=key,
            namespace=name.encode(),
        )
        bounds = replace(config, max_model_len=plan.max_model_len)
        trace = TraceWriter(config.trace, bounds, pool) if config.trace else None
        undo.callback(trace.abandon if trace else bool)
        with TorchThreads(threads):
            runner = _load_runner(prepared, config, filled)
            scheduler = scheduler_for(bounds, model, pool, runner, trace, tiered=store is not None)
        undo.pop_all()
    info = engine_info(plan, model, config, eos_ids, name)
    constraints = constraints_of_model(directory, info, prepared.threads, tokenizer)
    ranks = runner.model.ranks
    tier = disk_tier(scheduler, runner.cache, store, model, alone=ranks is None)
    ahead = steps_ahead(runner, scheduler, plan.block_size)
    made: Callable[..., Engine] = partial(Engine, ahead=ahead)
    if ranks is not None:
        moves = ExpertMoves(prepared.loader, runner.model)
        made = partial(RankEngine, use=ranks.join, moves=moves)
    return made(runner, scheduler, info, constraints, trace=trace, tier=tier, torch_threads=threads)


@uncollected()
def _filled(prepared: Prepared, config: EngineConfig) -> tuple[Decoder, MemoryPlan]:
    """The model with its weights, and the plan as it fits beside them."""
    model = prepared.decoder
    if not model.norm.weight.is_meta:  # an engine was made of this before
        host = None if model.host is None else model.host.again()
        model = decoder_of(model.config, model.ops, model.dtype, "meta", model.ranks, host)
    if model.ranks is not None:
        model.ranks.join(Alone(exchange_spec(prepared), model.ranks.rank))
    with told_of_memory(prepared.plan, prepared.device):
        prepared.loader.fill(model)
    specs = model.config.caches(prepared.dtype, prepared.kv_dtype)
    rows = step_rows(config)
    return model, fit_to_device(prepared.plan, model, specs, prepared.device, rows, config)


@uncollected()
def _load_runner(prepared: Prepared, config: EngineConfig, model: Decoder) -> Runner:
    """Reserve the cache, and make the first steps."""
    plan = prepared.plan
    states = plan.groups.states
    cache = KVCache(
        prepared.checkpoint.config.caches(prepared.dtype, prepared.kv_dtype),
        prepared.ops,
        num_blocks=plan.num_blocks,
        block_size=plan.block_size,
        device=prepared.device,
        num_states=0 if states is None else states.num_slots,
        key_offsets=key_offsets(model) if prepared.kv_dtype == torch.int8 else (),
    )
    rows = replace(step_rows(config), sequences=config.max_num_seqs, context=plan.max_model_len)
    with told_of_memory(plan, prepared.device):
        runner = Runner(model, cache, prepared.device, rows, prepared.workspace)
        runner.warm_up()
    return runner


def exchange_spec(prepared: Prepared) -> ExchangeSpec:
    """What the ranks of this model's group have in common."""
    ranks = prepared.decoder.ranks
    assert ranks is not None, "this engine shares its experts with nobody"
    model = prepared.decoder.config
    routers = [part.router for part in model.feed_forward if part.router is not None]
    return ExchangeSpec(
        size=ranks.placement.ranks,
        tokens=ranks.tokens,
        hidden=model.hidden_size,
        top_k=max(router.top_k for router in routers),
        dtype=prepared.dtype,
        gathered=min(SHARED_ROWS, ranks.tokens),
        width=model.vocab_size,
    )


def step_rows(config: EngineConfig) -> StepRows:
    """How many rows memory is planned for, and recorded for."""
    return StepRows(config.max_num_batched_tokens, logit_rows(config))


def _cache_sizes(specs: Sequence[CacheSpec], ops: Ops, block_size: int) -> CacheSizes:
    return CacheSizes(
        windows=lay_out(specs).windows,
        block=block_bytes(specs, ops, block_size),
        state=state_bytes(specs),
        scratch=scratch_states(specs),
    )


def _torch_threads(prepared: Prepared, config: EngineConfig) -> int | None:
    """What torch computes a step with; None leaves it alone.

    Beside the kernels, which have threads of their own, a little of sampling is torch's: a second
    pool that spins for it costs both dearly on few cores.
    """
    host = prepared.decoder.host
    if host is not None and host.ops.own_threads:
        return 1
    if prepared.device.type != "cpu":
        return None
    if prepared.ops.own_threads:
        return 1
    return config.threads or default_threads()


def _device(target: Target, config: EngineConfig, share: ExpertShare | None) -> torch.device:
    device = target.device(config.device, 1 if share is None else share.ranks)
    if config.device_experts is not None and device.type == "cpu":
        raise ConfigError(
            "experts may lie in the host's memory beside a CUDA device, and torch finds none: all "
            "of the model is computed in the host's memory; leave --experts out"
        )
    return device


def weights_name(directory: Path) -> str:
    """What tells a model's files from another's. Raises UsageError for what is no model."""
    return fingerprint(open_checkpoint(directory))


def _fingerprint(prepared: Prepared) -> str:
    """Names weights, configuration and kernels, keys and values that are codes, and which experts
    the host computes; `-approx` where batch mates may change a bit (promise P1 is off)."""
    name = f"fp_{fingerprint(prepared.checkpoint)}_{prepared.ops.name}_{dtype_name(prepared.dtype)}"
    if prepared.kv_dtype == torch.int8:
        name += "_kv-int8"
    if prepared.decoder.host is not None:
        name += f"_{placement_name(prepared.decoder.host)}"
    return name if prepared.batch_invariant else f"{name}-approx"
