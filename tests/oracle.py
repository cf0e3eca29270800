"""transformers as the oracle: tiny random models in every shape we claim to read, and how ours is
run beside them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from moebius.models.decoder import Decoder
from moebius.nn.paged import PagedPast
from moebius.ops import LayerCache
from moebius.ops.steps import StateInputs, StepInputs

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
# Which transformers builds as a part of models that see alone.
AutoModelForCausalLM.register(
    transformers.Mistral4Config, transformers.Mistral4ForCausalLM, exist_ok=True
)

TINY: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
FAMILY: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 20},
    "mistral": {"intermediate_size": 20},
    "qwen2": {"intermediate_size": 20},
    "qwen3": {"intermediate_size": 20, "head_dim": 10},
    "mixtral": {"intermediate_size": 20, "num_local_experts": 5},
    "qwen2_moe": {
        "intermediate_size": 20,
        "moe_intermediate_size": 14,
        "shared_expert_intermediate_size": 18,
        "num_experts": 5,
        "num_experts_per_tok": 3,
    },
    "qwen3_moe": {
        "intermediate_size": 20,
        "moe_intermediate_size": 14,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "head_dim": 10,
        "norm_topk_prob": True,
    },
    "olmoe": {"intermediate_size": 14, "num_experts": 5, "num_experts_per_tok": 3},
    "dots1": {
        "intermediate_size": 20,
        "moe_intermediate_size": 14,
        "n_routed_experts": 6,
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
        "head_dim": 10,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 1,
        "sliding_window": None,
    },
    "granite": {
        "intermediate_size": 20,
        "attention_multiplier": 0.3,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "logits_scaling": 2.5,
    },
    "granitemoe": {
        "intermediate_size": 14,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "attention_multiplier": 0.3,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "logits_scaling": 2.5,
    },
    "gpt_oss": {
        "intermediate_size": 20,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "head_dim": 10,
        "sliding_window": 4,
    },
    "glm4_moe": {
        "intermediate_size": 20,
        "moe_intermediate_size": 14,
        "n_routed_experts": 6,
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
        "head_dim": 12,
        "routed_scaling_factor": 2.5,
        "use_qk_norm": True,
        "attention_bias": True,
    },
    "minimax_m2": {
        "intermediate_size": 14,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "head_dim": 12,
        "rotary_dim": 8,
    },
    "ernie4_5_moe": {
        "intermediate_size": 20,
        "moe_intermediate_size": 14,
        "moe_num_experts": 5,
        "moe_k": 3,
        "num_hidden_layers": 3,
    },
    "mellum": {
        "intermediate_size": 20,
        "moe_intermediate_size": 14,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "head_dim": 10,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "exaone_moe": {
        "intermediate_size": 20,
        "moe_intermediate_size": 14,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "num_shared_experts": 2,
        "sliding_window": 4,
        "sliding_window_pattern": 2,
    },
    "solar_open": {
        "moe_intermediate_size": 14,
        "n_routed_experts": 6,
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
        "head_dim": 10,
        "routed_scaling_factor": 2.5,
    },
    "hy_v3": {
        "intermediate_size": 20,
        "moe_intermediate_size": 14,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "num_shared_experts": 2,
        "head_dim": 10,
    },
    "hunyuan_v1_moe": {
        "intermediate_size": 14,
        "num_experts": 5,
        "moe_topk": 2,
        "head_dim": 10,
    },
    "flex_olmo": {"intermediate_size": 14, "num_experts": 5, "num_experts_per_tok": 3},
    "afmoe": {
        "intermediate_size": 20,
        "moe_intermediate_size": 14,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "num_shared_experts": 2,
        "num_hidden_layers": 4,
        "head_dim": 10,
        "sliding_window": 4,
        "route_scale": 2.5,
        "mup_enabled": True,
    },
    "laguna": {
        "intermediate_size": 20,
        "moe_intermediate_size": 14,
        "shared_expert_intermediate_size": 18,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "head_dim": 12,
        "sliding_window": 4,
        "layer_types": ["full_attention", "sliding_attention"],
        "num_attention_heads_per_layer": [4, 6],
        "moe_routed_scaling_factor": 1.5,
    },
    "cohere2_moe": {
        "intermediate_size": 14,
        "prefix_dense_intermediate_size": 20,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "num_shared_experts": 2,
        "head_dim": 10,
        "sliding_window": 4,
        "logit_scale": 0.25,
        "num_hidden_layers": 3,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "expert_selection_fn": "sigmoid",
    },
    "phi3": {"intermediate_size": 20},
    "gemma3_text": {
        "intermediate_size": 20,
        "head_dim": 10,
        "query_pre_attn_scalar": 10,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gemma4_text": {
        "intermediate_size": 20,
        "moe_intermediate_size": 14,
        "enable_moe_block": True,
        "num_experts": 5,
        "top_k_experts": 2,
        "head_dim": 10,
        "global_head_dim": 16,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "hidden_size_per_layer_input": 0,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gemma4_unified_text": {
        "intermediate_size": 20,
        "head_dim": 10,
        "global_head_dim": 16,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}
HYBRID: dict[str, Any] = {
    "full_attention_interval": 2,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 6,
}
SPARSE_HYBRID: dict[str, Any] = {
    **HYBRID,
    "moe_intermediate_size": 14,
    "shared_expert_intermediate_size": 18,
    "num_experts": 5,
    "num_experts_per_tok": 2,
}
FAMILY |= {
    "qwen3_next": {**SPARSE_HYBRID, "intermediate_size": 20},
    "qwen3_5_moe_text": SPARSE_HYBRID,
    "qwen3_5_text": {**HYBRID, "intermediate_size": 20},
}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "intermediate_size": 20,
    "moe_intermediate_size": 14,
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "kv_lora_rank": 12,
    "q_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
LIMITED: dict[str, Any] = {**LATENT, "n_group": 3, "topk_group": 2}
INDEXED: dict[str, Any] = {
    **LIMITED,
    "first_k_dense_replace": 1,
    "index_n_heads": 2,
    "index_head_dim": 6,
    "index_topk": 64,
}
FAMILY |= {
    "deepseek_v2": {**LATENT, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5},
    "deepseek_v3": {**LIMITED, "first_k_dense_replace": 1},
    "glm4_moe_lite": LATENT,
    "mistral4": {
        **LATENT,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10_000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 5,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.3,
        },
    },
    "axk1": LIMITED,
    "deepseek_v32": INDEXED,
    "glm_moe_dsa": {**INDEXED, "indexer_types": ["full", "shared"]},
}
DELTA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "intermediate_size": 20,
    "moe_intermediate_size": 14,
    "num_local_experts": 6,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "layer_types": ["linear_attention", "full_attention"],
    "mlp_layer_types": ["dense", "sparse"],
}
FAMILY |= {
    "kimi_linear": {**DELTA, "linear_num_heads": 4, "linear_head_dim": 5},
    # What transformers writes as head_dim is qk_rope_head_dim.
    "bailing_hybrid": {**DELTA, "head_dim": 4, "n_group": 2, "topk_group": 1},
}
FAMILY["granitemoeshared"] = {**FAMILY["granitemoe"], "shared_intermediate_size": 18}
FAMILY |= {
    "lfm2": {
        "intermediate_size": 20,
        "block_auto_adjust_ff_dim": False,
        "layer_types": ["conv", "full_attention"],
    },
    "lfm2_moe": {
        "intermediate_size": 20,
        "moe_intermediate_size": 14,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "num_dense_layers": 1,
        "layer_types": ["full_attention", "conv", "conv"],
        "num_hidden_layers": 3,
    },
    "granitemoehybrid": {
        **FAMILY["granitemoeshared"],
        "layer_types": ["linear_attention", "full_attention"],
        "mamba_n_heads": 4,
        "mamba_n_groups": 2,
        "mamba_d_state": 6,
    },
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
        "num_hidden_layers": 4,
        "intermediate_size": 20,
        "moe_intermediate_size": 14,
        "moe_shared_expert_intermediate_size": 18,
        "n_routed_experts": 6,
        "num_experts_per_tok": 3,
        "routed_scaling_factor": 2.5,
        "head_dim": 10,
        "mamba_num_heads": 4,
        "mamba_head_dim": 5,
        "ssm_state_size": 6,
        "n_groups": 2,
        # What transformers bounds the first token's steps by, and no other's.
        "time_step_min": 1e-9,
    },
}

# One family of each kind: dense, routed, with shared experts, with latents, windows and sinks, heads
# of two sizes; and with states: of a delta rule, of one for each channel, of a scan, of a convolution.
# What no family has of its own is combined with these in every run, with the others by -m exhaustive.
ONE_OF_EACH_KIND = (
    "llama",
    "qwen3_moe",
    "qwen2_moe",
    "deepseek_v3",
    "gpt_oss",
    "gemma4_text",
    "qwen3_next",
    "kimi_linear",
    "nemotron_h",
    "lfm2_moe",
)

PROMPT = [5, 66, 0, 17, 23, 23, 41, 8, 30, 2, 60, 11, 1]


def tiny_model(model_type: str, seed: int = 0, **overrides: Any) -> Any:
    """A random float32 model of transformers, its norms and biases random too, in its plainest
    implementation."""
    # Configuration classes of transformers write into the objects that they are given.
    sizes = copy.deepcopy({**TINY, **FAMILY[model_type], **overrides})
    return tiny_of(AutoConfig.for_model(model_type, **sizes), seed)


def tiny_of(config: Any, seed: int = 0) -> Any:
    """The same of any configuration."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if "correction_bias" in name or "expert_bias" in name:
                buffer.copy_(0.3 * torch.randn_like(buffer))
            if "layer_scalar" in name:
                buffer.copy_(1 + 0.3 * torch.randn_like(buffer))
    return model.eval()


def saved_tiny(directory: Path, model_type: str, seed: int = 0, **overrides: Any) -> Any:
    """tiny_model, saved; returns it."""
    model = tiny_model(model_type, seed, **overrides)
    model.save_pretrained(directory)
    return model


@dataclass(frozen=True)
class _Saved:
    """The files of a tiny model, and torch's random state behind it, as if it were made anew."""

    files: dict[str, bytes]
    random: Tensor


_SAVED: dict[str, _Saved] = {}
# What a session keeps at most of each: some hundred of them are asked for.
_MOST_BYTES = 2**20


def save_tiny(directory: Path, model_type: str, seed: int = 0, **overrides: Any) -> None:
    """tiny_model, saved: made and written out by transformers once a session, then copied."""
    asked = repr((model_type, seed, sorted(overrides.items())))
    if asked in _SAVED:
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in _SAVED[asked].files.items():
            (directory / name).write_bytes(content)
        torch.set_rng_state(_SAVED[asked].random)
        return
    before = set(directory.iterdir()) if directory.exists() else set()
    saved_tiny(directory, model_type, seed, **overrides)
    made = {path.name: path.read_bytes() for path in set(directory.iterdir()) - before}
    if not before and sum(map(len, made.values())) <= _MOST_BYTES:
        _SAVED[asked] = _Saved(made, torch.get_rng_state())


def load_theirs(directory: Path) -> Any:
    """transformers' own reading of a directory, in float32, which must find every tensor in its
    place."""
    model, report = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), (
        report
    )
    return model.eval()


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-4) -> None:
    """Within `tolerance` of the oracle, relative to the scale of its values."""
    error = (ours - theirs).abs().max().item() / theirs.abs().max().item()
    assert error <= tolerance, f"differs by {error:.2e} of the scale"


# Of states, more than sequences that any test runs at a time.
_SLOTS = 40


class Server:
    """Runs a decoder through its paged cache, as an engine would, and keeps every row's logits.

    The cache and the states start full of NaN: whatever is read before it is written shows.
    """

    def __init__(self, decoder: Decoder, block_size: int, num_blocks: int, seed: int = 0) -> None:
        config, dtype = decoder.config, decoder.dtype
        self.decoder, self.block_size = decoder, block_size
        self.ops = decoder.ops
        self.caches = []
        for spec in config.caches(dtype):
            if not spec.token:
                self.caches.append(LayerCache())
                continue
            size = self.ops.cache_bytes_per_block(spec, block_size) * num_blocks
            memory = torch.full((size,), 255, dtype=torch.uint8)
            self.caches.append(self.ops.make_cache(memory, spec, block_size))
        self.free = torch.randperm(
            num_blocks, generator=torch.Generator().manual_seed(seed)
        ).tolist()
        self.states = [
            {
                plane.name: torch.full((_SLOTS, *plane.shape), torch.nan, dtype=plane.dtype)
                for plane in spec.state
            }
            for spec in config.caches(dtype)
        ]
        self.blocks: dict[int, list[int]] = {}
        self.done: dict[int, int] = {}
        self.logits: dict[int, list[Tensor]] = {}

    @torch.inference_mode()
    def step(self, work: Sequence[tuple[int, Sequence[int]]]) -> None:
        """Compute each sequence's next tokens: (sequence, token ids) pairs, in one step."""
        starts = [self.done.get(sequence, 0) for sequence, _ in work]
        tables = []
        for (sequence, ids), start in zip(work, starts, strict=True):
            table = self.blocks.setdefault(sequence, [])
            while len(table) * self.block_size < start + len(ids):
                table.append(self.free.pop())
            tables.append(table)
            self.done[sequence] = start + len(ids)
        states = None
        if any(self.states):
            slots = [_SLOTS - 1 - sequence for sequence, _ in work]
            cleared = [slot for slot, start in zip(slots, starts, strict=True) if not start]
            states = StateInputs(slots, cleared, (), ())
            for plane in (plane for layer in self.states for plane in layer.values()):
                plane[cleared] = 0
        given = [ids for _, ids in work]
        inputs = StepInputs.build(given, starts, tables, self.block_size, states=states)
        groups = [0] * len(self.caches)
        past = PagedPast(self.ops, self.caches, groups, inputs, self.block_size, self.states)
        hidden, _ = self.decoder(inputs.input_ids, inputs.positions, past)
        logits = self.decoder.logits(hidden)
        for (sequence, _), part in zip(
            work, logits.split([len(ids) for _, ids in work]), strict=True
        ):
            self.logits.setdefault(sequence, []).append(part)

    def greedy(self, sequence: int) -> int:
        return int(self.logits[sequence][-1][-1].argmax())

    def all_logits(self, sequence: int) -> Tensor:
        return torch.cat(self.logits[sequence])


def assert_same_answers(decoder: Decoder, directory: Path, theirs: Any = None) -> None:
    """Logits of PROMPT in chunks and of each token after it, and which ones follow, as transformers
    has them of the checkpoint in `directory`, or of this model that was read from it."""
    server = Server(decoder, block_size=5, num_blocks=8)
    ids = list(PROMPT)
    server.step([(0, ids[:4])])
    server.step([(0, ids[4:])])
    for _ in range(6):
        ids.append(server.greedy(0))
        server.step([(0, ids[-1:])])
    with torch.inference_mode():
        logits = (theirs or load_theirs(directory))(torch.tensor([ids])).logits[0]
    assert_close(server.all_logits(0), logits)
    assert ids[len(PROMPT) :] == logits[len(PROMPT) - 1 : -1].argmax(-1).tolist()
