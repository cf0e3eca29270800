"""From a model directory to a running engine: check, plan, load, reserve, warm up."""

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from moebius import machine
from moebius.engine.cache_sizes import CacheSizes
from moebius.engine.config import EngineConfig
from moebius.engine.constraints import constraints_of_model
from moebius.engine.disk_directory import launch_key
from moebius.engine.disk_start import disk_tier, open_disk
from moebius.engine.drafting import scheduler_for, why_not
from moebius.engine.dtypes import choose_dtype, choose_kv_dtype
from moebius.engine.encoders import as_asked, shares_prefixes
from moebius.engine.engine import Engine
from moebius.engine.expert_share import ExpertShare, part_of_host
from moebius.engine.garbage import uncollected
from moebius.engine.info import engine_info
from moebius.engine.kv_cache import (
    KVCache,
    block_bytes,
    lay_out,
    scratch_states,
    state_bytes,
)
from moebius.engine.memory import (
    MemoryPlan,
    exchange_bytes,
    logit_rows,
    plan_memory,
)
from moebius.engine.moves import ExpertMoves
from moebius.engine.plan_words import human_bytes
from moebius.engine.rank import RankEngine
from moebius.engine.runner import Runner
from moebius.engine.shared_head import SHARED_ROWS
from moebius.engine.trace import TraceWriter
from moebius.engine.weight_bytes import common_bytes, count_weights
from moebius.engine.workspace import StepRows, Workspace, plan_workspace
from moebius.errors import ConfigError
from moebius.models.decoder import Decoder
from moebius.models.encoder_decoder import decoder_of
from moebius.models.key_offsets import key_offsets
from moebius.models.layout import Source
from moebius.models.store import Checkpoint, PlannedWeight, fingerprint, open_checkpoint
from moebius.models.store.load import Loader
from moebius.models.store.tensors import NUMBER_BYTES
from moebius.models.uses import check_served
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
class Prepared:
    """A checked checkpoint with everything decided that loading needs. Nothing is allocated yet."""

    checkpoint: Checkpoint
    ops: Ops
    device: torch.device
    dtype: torch.dtype
    kv_dtype: torch.dtype
    weights: list[PlannedWeight]
    plan: MemoryPlan
    threads: int
    workspace: Workspace
    decoder: Decoder
    """Without memory; the first engine that is made of this fills it."""
    loader: Loader
    quantized: Quantized | None = None
    """What `checkpoint` is made by, where it is to have fewer bits."""
    speculative: str = "none"

    @property
    def batch_invariant(self) -> bool:
        """Promise P1: told by the operations that this model uses."""
        return self.workspace.batch_invariant(self.ops)

    def rows(self) -> list[tuple[str, str, str]]:
        """The plan as a table: (what, how much, remark)."""
        weights, *rest = self.plan.rows()
        return [
            weights,
            *self._format_rows(),
            *self._quantization_rows(),
            *rest,
            *self._drafting_rows(),
            *self._rank_rows(),
            ("threads", str(self.threads), f"{machine.processors():g} processors may be used"),
        ]

    def _format_rows(self) -> list[tuple[str, str, str]]:
        formats = self.checkpoint.formats
        if set(formats) <= NUMBER_BYTES.keys():
            return []
        parts = (f"{human_bytes(nbytes)} {name}" for name, nbytes in formats.items())
        return [("formats", "", ", ".join(parts))]

    def _quantization_rows(self) -> list[tuple[str, str, str]]:
        if self.quantized is None:
            return []
        before = human_bytes(sum(self.quantized.original.formats.values()))
        after = human_bytes(sum(self.quantized.checkpoint.formats.values()))
        remark = f"{before} become {after}; kept in {self.quantized.file.parent}"
        return [("quantization", self.quantized.recipe.name, remark)]

    def _drafting_rows(self) -> list[tuple[str, str, str]]:
        if self.speculative == "none":
            return []
        reason = why_not(self.checkpoint.config, self.plan.groups)
        return [("drafts", "off" if reason else self.speculative, reason or "where they pay")]

    def _rank_rows(self) -> list[tuple[str, str, str]]:
        ranks = self.decoder.ranks
        if ranks is None:
            return []
        count = ranks.placement.ranks
        held = {len(ranks.held(layer) or ()) for layer in ranks.placement.layers}
        of = set(ranks.placement.experts.values())
        exchanged = exchange_bytes(self.decoder.config, ranks.tokens, count, self.dtype.itemsize)
        experts = f"{_range(held)} of {_range(of)} experts a layer"
        traded = f"{human_bytes(exchanged)} exchanged in the largest step at most"
        return [("rank", f"{ranks.rank} of {count}", f"{experts}; {traded}")]


@uncollected()
def prepare(
    directory: Path, config: EngineConfig, share: ExpertShare | None = None, *, ahead: bool = False
) -> Prepared:
    """Check a model and plan its memory, by the heads of its files alone. Raises UsageError.

    share: the rank to plan for; None: of config.ranks the one that has least memory, as if all were
    on this host. ahead: an engine will be made of it; weights that there is room for may be read.
    """
    if share is None and config.ranks > 1:
        share, config = ExpertShare.on_this_host(directory, config)
    checkpoint = _published(directory, config.max_model_len)
    quantized = Quantized.by_name(checkpoint, config.quantization)
    checkpoint = as_asked(checkpoint if quantized is None else quantized.checkpoint, config)
    device = _device(config.device, share)
    dtype = choose_dtype(config.dtype, checkpoint.dtype, device.type)
    kv_dtype = choose_kv_dtype(config.kv_cache_dtype, dtype)
    ops = _ops(checkpoint, config, device, dtype)
    check_served(checkpoint.config, dtype, ops, kv_dtype)
    ranks = None if share is None else share.of(checkpoint.config, config)
    memory = None if share is None or not share.memory_apart else share.memory
    sources = checkpoint.sources_at(ranks)
    weights = checkpoint.plan_weights(
        dtype_name(dtype), device.type, ops.formats(dtype), sources, near=memory is not None
    )
    weight_bytes = count_weights(sources, weights, checkpoint.dtype, config, ranks)
    weight_bytes = replace(weight_bytes, nodes=() if memory is None else memory.nodes)
    available, available_of = _room(device, share, sources, weights)
    loader = Loader(checkpoint, device, near=memory is not None, cold=config.mmap_cold)
    if ahead and quantized is None and weight_bytes.total <= available:
        loader.read_ahead(ranks)
    decoder = decoder_of(checkpoint.config, ops, dtype, device="meta", ranks=ranks)
    workspace = _workspace(decoder, config, kv_dtype)
    plan = plan_memory(
        checkpoint.config,
        config,
        weight_bytes,
        dtype=dtype_name(dtype),
        device=device.type,
        kv_dtype=dtype_name(kv_dtype),
        cache=_cache_sizes(checkpoint.config.caches(dtype, kv_dtype), ops, config.block_size),
        available=available,
        available_of=available_of,
        recorded=workspace.nbytes if workspace.recorded else None,
        ranks=1 if share is None else share.ranks,
    )
    return Prepared(
        checkpoint=checkpoint,
        ops=ops,
        device=device,
        dtype=dtype,
        kv_dtype=kv_dtype,
        weights=weights,
        plan=plan,
        threads=_threads(config),
        workspace=workspace,
        decoder=decoder,
        loader=loader,
        quantized=quantized,
        speculative=config.speculative,
    )


def _workspace(decoder: Decoder, config: EngineConfig, kv_dtype: torch.dtype) -> Workspace:
    context = config.max_model_len or decoder.config.context
    return plan_workspace(decoder, config.block_size, step_rows(config), context, kv_dtype)


def _ops(
    checkpoint: Checkpoint, config: EngineConfig, device: torch.device, dtype: torch.dtype
) -> Ops:
    """Where there are matrices whose products have the same bits on every processor, all others'
    are to have them too."""
    blocks = {each.name for each in BLOCK_FORMATS}
    some = any(tensor.format in blocks for tensor in checkpoint.tensors.values())
    ordered = config.activations == "int8" and some
    return select_ops(device, dtype, config.threads, config.activations, ordered=ordered)


def _threads(config: EngineConfig) -> int:
    cores = machine.threads()
    if config.threads is not None and config.threads > cores:
        log.warning(
            "--threads %d is more than the %d cores that may be used", config.threads, cores
        )
    return config.threads or cores


def _room(
    device: torch.device,
    share: ExpertShare | None,
    sources: Sequence[Source],
    weights: Sequence[PlannedWeight],
) -> tuple[int, str]:
    """Bytes that an engine with these weights may take, and of what."""
    available, of = _available(device)
    if share is None:
        return available, of
    return part_of_host(available, of, share, common_bytes(sources, weights))


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


def _range(numbers: set[int]) -> str:
    low = min(numbers)
    high = max(numbers)
    return str(low) if low == high else f"{low} to {high}"


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
    plan = prepared.plan
    model = prepared.checkpoint.config
    if prepared.quantized is not None:
        prepared.quantized.make(bytes_bar)
    name = _fingerprint(prepared)
    key = prefix_key or launch_key(config)
    threads = _torch_threads(prepared, config)
    with ExitStack() as undo:
        store = open_disk(config, model, key, prepared.decoder.ranks)
        undo.callback(store.close if store else bool)
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
            runner = _load_runner(prepared, config)
            scheduler = scheduler_for(bounds, model, pool, runner, trace, tiered=store is not None)
        undo.pop_all()
    info = engine_info(plan, model, config, eos_ids, name)
    constraints = constraints_of_model(directory, info, prepared.threads, tokenizer)
    ranks = runner.model.ranks
    tier = disk_tier(scheduler, runner.cache, store, model, alone=ranks is None)
    made: Callable[..., Engine] = Engine
    if ranks is not None:
        moves = ExpertMoves(prepared.loader, runner.model)
        made = partial(RankEngine, use=ranks.join, moves=moves)
    return made(runner, scheduler, info, constraints, trace=trace, tier=tier, torch_threads=threads)


@uncollected()
def _load_runner(prepared: Prepared, config: EngineConfig) -> Runner:
    """Map or copy the weights, reserve the cache, and make the first steps."""
    plan = prepared.plan
    model = prepared.decoder
    if not model.norm.weight.is_meta:  # an engine was made of this before
        ranks = prepared.decoder.ranks
        model = decoder_of(model.config, model.ops, model.dtype, device="meta", ranks=ranks)
    prepared.loader.fill(model)
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
    if model.ranks is not None:
        model.ranks.join(Alone(exchange_spec(prepared), model.ranks.rank))
    runner = Runner(model, cache, prepared.device, step_rows(config), prepared.workspace)
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
    if prepared.device.type != "cpu":
        return None
    if prepared.ops.own_threads:
        return 1
    return config.threads or default_threads()


def _device(wish: str, share: ExpertShare | None) -> torch.device:
    has_cuda = torch.cuda.is_available()
    if wish == "cuda" and not has_cuda:
        raise ConfigError(
            "--device cuda: torch finds no CUDA device; use --device cpu, or install a CUDA build "
            "of torch"
        )
    device = torch.device("cuda" if wish == "cuda" or (wish == "auto" and has_cuda) else "cpu")
    if share is not None and device.type != "cpu":
        raise ConfigError("ranks share experts on CPUs only; use --device cpu, or --ranks 1")
    return device


def _available(device: torch.device) -> tuple[int, str]:
    """Bytes that are left where the engine will be, and of what."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        return free, f"the device's {human_bytes(total)}"
    memory = machine.memory()
    return memory.available, f"the {memory.owner}'s {human_bytes(memory.limit)}"


def weights_name(directory: Path) -> str:
    """What tells a model's files from another's. Raises UsageError for what is no model."""
    return fingerprint(open_checkpoint(directory))


def _fingerprint(prepared: Prepared) -> str:
    """Names weights, configuration and kernels, and keys and values that are codes; `-approx`
    where batch mates may change a bit (promise P1 is off)."""
    name = f"fp_{fingerprint(prepared.checkpoint)}_{prepared.ops.name}_{dtype_name(prepared.dtype)}"
    if prepared.kv_dtype == torch.int8:
        name += "_kv-int8"
    return name if prepared.batch_invariant else f"{name}-approx"
