"""Whether an engine has a KV cache on disk, and what its files depend on."""

import logging
import sys
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path

import torch

from moebius.engine.config import EngineConfig
from moebius.engine.disk_store import DiskBounds, DiskStore
from moebius.engine.disk_tier import DiskTier
from moebius.engine.faults import say
from moebius.engine.kv_cache import KVCache
from moebius.engine.plan_words import human_bytes
from moebius.engine.tier import NO_TIER, Tier
from moebius.errors import ConfigError
from moebius.models.config import ModelConfig
from moebius.moe.ranks import ExpertRank
from moebius.schedule.scheduler import Scheduler
from moebius.schedule.tiers import TieredScheduler

log = logging.getLogger(__name__)


def open_disk(
    config: EngineConfig, model: ModelConfig, key: bytes, ranks: ExpertRank | None
) -> DiskStore | None:
    """The files that an engine keeps, where it is to keep any. Raises UsageError and StorageError.

    key   of the launch's prefix hashes
    """
    if config.kv_cache_disk is None or config.kv_cache_disk_bytes is None:
        return None
    if model.encoder_layers:
        raise ConfigError(
            "kv_cache_disk (--kv-cache-disk) keeps prefixes, and with an encoder there are none to "
            "share; leave it out"
        )
    store = DiskStore(
        Path(config.kv_cache_disk),
        key,
        DiskBounds(config.kv_cache_disk_bytes),
        rank=0 if ranks is None else ranks.rank,
        ranks=config.ranks,
    )
    found = store.stats()
    say(
        log.info,
        "KV cache on disk: %s in %d files of %s",
        human_bytes(found.nbytes),
        found.files,
        config.kv_cache_disk,
    )
    return store


def disk_tier(
    scheduler: Scheduler,
    cache: KVCache,
    store: DiskStore | None,
    model: ModelConfig,
    *,
    alone: bool,
) -> Tier:
    """The tier over a store.

    alone   no other rank waits for this one's steps, so it may wait for a file
    """
    if store is None:
        return NO_TIER
    assert isinstance(scheduler, TieredScheduler), "a scheduler with a store is made for it"
    if alone:
        return DiskTier(scheduler, cache, store, realm(model))
    return DiskTier(scheduler, cache, store, realm(model), nap=0.0)


def realm(model: ModelConfig) -> bytes:
    """What the bytes of keys, values and states depend on, beside what prefix hashes and the
    cache's own description name: which program computed them, and with which of the model's
    variants. Nothing that changes no byte: no context, batch, thread, rank or port."""
    digest = blake2b(digest_size=32, person=b"moebius-disk")
    for part in (version("moebius"), torch.__version__, repr(model.layers)):
        digest.update(len(part).to_bytes(8, "little") + part.encode())
    kernels = sys.modules.get("moebius._cpu")
    if kernels is not None and kernels.__file__ is not None:
        digest.update(Path(kernels.__file__).read_bytes())
    return digest.digest()
