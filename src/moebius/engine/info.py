"""What a front has to know of an engine."""

from moebius.engine.client import EngineInfo
from moebius.engine.config import EngineConfig
from moebius.engine.encoders import shares_prefixes
from moebius.engine.memory import MemoryPlan
from moebius.models.config import ModelConfig
from moebius.request.params import ServingLimits


def engine_info(
    plan: MemoryPlan,
    model: ModelConfig,
    config: EngineConfig,
    eos_ids: frozenset[int],
    fingerprint: str,
) -> EngineInfo:
    """Of an engine that was planned so. Behind an encoder's prompt the decoder's first token takes
    a place of the context."""
    start_ids = (model.start_id,) if model.encoder_layers else ()
    return EngineInfo(
        limits=ServingLimits(
            model.vocab_size,
            plan.max_model_len - len(start_ids),
            priorities=config.scheduling_policy == "priority",
        ),
        eos_ids=eos_ids,
        block_size=plan.block_size,
        num_blocks=plan.num_blocks,
        fingerprint=fingerprint,
        prefix_caching=shares_prefixes(model, config),
        kv_dtype=plan.kv_dtype,
        kv_bytes=plan.kv_cache,
        start_ids=start_ids,
    )
