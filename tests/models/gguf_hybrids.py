"""The same of models with gated delta nets: tiled value heads, projections taken apart, and numbers
that the converter changes."""

from __future__ import annotations

import gguf
import torch
from torch import Tensor

from models.gguf_writing import ARCHITECTURES, SUFFIXES, Converter

HYBRIDS = {
    "qwen3_next": "QWEN3NEXT",
    "qwen3_5_text": "QWEN35",
    "qwen3_5_moe_text": "QWEN35MOE",
}
ARCHITECTURES.update(HYBRIDS)


class HybridConverter(Converter):
    """One Hugging Face directory of Qwen3-Next or Qwen3.5 into one file."""

    def own_keys(self, w: gguf.GGUFWriter) -> None:
        c = self.config
        arch = gguf.MODEL_ARCH_NAMES[self.architecture]
        if "moe_intermediate_size" in c:
            w.add_expert_feed_forward_length(c["moe_intermediate_size"])
            w.add_expert_shared_feed_forward_length(c["shared_expert_intermediate_size"])
        w.add_ssm_conv_kernel(c["linear_conv_kernel_dim"])
        w.add_ssm_state_size(c["linear_key_head_dim"])
        w.add_ssm_group_count(c["linear_num_key_heads"])
        w.add_ssm_time_step_rank(c["linear_num_value_heads"])
        w.add_ssm_inner_size(c["linear_num_value_heads"] * c["linear_value_head_dim"])
        recurrent = [kind == "linear_attention" for kind in c["layer_types"]]
        w.add_array(f"{arch}.attention.recurrent_layers", recurrent)
        w.add_full_attention_interval(c.get("full_attention_interval", 4))
        partial = self.rope.get("partial_rotary_factor", 0.25)
        w.add_rope_dimension_count(int(c["head_dim"] * partial))
        if self.model_type != "qwen3_next":
            w.add_rope_dimension_sections([11, 11, 10, 0])

    @property
    def _value_heads(self) -> Tensor:
        """Which of the value heads stands where: tiled in Qwen3.5's files."""
        c = self.config
        heads = torch.arange(c["linear_num_value_heads"])
        if self.model_type == "qwen3_next":
            return heads
        return heads.view(c["linear_num_key_heads"], -1).T.flatten()

    @property
    def _values(self) -> Tensor:
        """The same of all of their values."""
        size = self.config["linear_value_head_dim"]
        return (self._value_heads.unsqueeze(1) * size + torch.arange(size)).flatten()

    def _rows(self, role: str) -> list[Tensor]:
        """Which rows of a tensor stand where, in each tensor that becomes of it."""
        c = self.config
        key, value = c["linear_key_head_dim"], c["linear_value_head_dim"]
        keys = 2 * key * c["linear_num_key_heads"]
        if role in ("in_proj_qkv.weight", "conv1d.weight"):
            return [torch.cat((torch.arange(keys), keys + self._values))]
        if role == "in_proj_z.weight":
            return [self._values]
        if role in ("in_proj_b.weight", "in_proj_a.weight", "A_log", "dt_bias"):
            return [self._value_heads]
        assert role == "in_proj_qkvz.weight"
        shared = c["linear_num_value_heads"] // c["linear_num_key_heads"] * value
        groups = torch.arange(keys + 2 * shared * c["linear_num_key_heads"])
        parts = groups.view(c["linear_num_key_heads"], -1).split([key, key, shared, shared], dim=1)
        q, k, v, z = (part.flatten() for part in parts)
        return [torch.cat((q, k, v)), z]

    def parts(self, name: str, tensor: Tensor) -> list[tuple[Tensor, str]]:
        before, _, role = name.partition(".linear_attn.")
        if name.endswith("norm.weight") and not role:
            tensor = tensor + 1
        if not role or role in ("norm.weight", "in_proj_ba.weight"):
            return super().parts(name, tensor)
        layer = before.split(".")[2]
        if role == "in_proj_qkvz.weight":
            qkv, z = self._rows(role)
            places = (f"blk.{layer}.attn_qkv.weight", f"blk.{layer}.attn_gate.weight")
            return [(tensor[qkv], places[0]), (tensor[z], places[1])]
        known = name.replace("dt_bias", "dt_proj.bias")
        place = self.names.get_name(known, SUFFIXES)
        assert place is not None, name
        if role == "out_proj.weight":
            return [(tensor[:, self._values], place)]
        written = (-tensor.exp() if role == "A_log" else tensor)[self._rows(role)[0]]
        return [(written.squeeze(1) if role == "conv1d.weight" else written, place)]

    def joined(self, name: str, again: list[Tensor]) -> Tensor:
        """What the file holds, as the directory has it."""
        _, _, role = name.partition(".linear_attn.")
        if name.endswith("norm.weight") and not role:
            return again[0] - 1
        if not role or role in ("norm.weight", "in_proj_ba.weight"):
            return super().joined(name, again)
        if role == "out_proj.weight":
            back = torch.empty_like(again[0])
            back[:, self._values] = again[0]
            return back
        written = torch.cat(again)
        back = torch.empty_like(written)
        back[torch.cat(self._rows(role))] = written
        if role == "A_log":
            return torch.log(-back)
        return back.unsqueeze(1) if role == "conv1d.weight" else back


class FirstConverter(HybridConverter):
    """The same of Qwen3-Next as in the weeks before its files had in_proj_qkvz taken apart."""

    def parts(self, name: str, tensor: Tensor) -> list[tuple[Tensor, str]]:
        if name.endswith(".in_proj_qkvz.weight"):
            place = self.names.get_name(name, SUFFIXES)
            assert place is not None, name
            return [(tensor, place)]
        return super().parts(name, tensor)

    def joined(self, name: str, again: list[Tensor]) -> Tensor:
        return again[0] if name.endswith(".in_proj_qkvz.weight") else super().joined(name, again)
