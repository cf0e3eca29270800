"""The past in training, evaluation and inspection: whole documents packed in rows, no cache.

Shape legend: T = R * L tokens in R rows of L; G key/value heads, S query heads that share one,
H = G * S; N head size; B queries of a block, K keys up to its end.
"""

import torch
from torch import Tensor

from moebius.nn.attention import Attention
from moebius.nn.linear import RMSNorm
from moebius.nn.mixers.latent import LatentRows
from moebius.nn.mixers.recurs import Recurrence, Recurrent
from moebius.ops import Rotation, StatePlan
from moebius.ops.reference import latent_keys, turned_queries, visible

# Queries of a row that are attended at a time: keys after them are never touched. On a GPU launches
# count for more.
QUERY_BLOCK = 128
DEVICE_BLOCK = 1024


class PackedPast:
    """Tokens see what stands before them in their row, causally.

    With document_ids_T a token sees only tokens of its row with its own id, and states begin anew
    with each. `on_host`: the same in the host's memory, so that no device is waited for. The mask
    is made once for all layers, and queries go in blocks that touch no key behind them: on a CPU
    several times as fast as torch's own with a mask.
    """

    def __init__(
        self,
        row_length: int,
        document_ids_T: Tensor | None = None,
        on_host: Tensor | None = None,
    ) -> None:
        self._length = row_length
        self._document_ids_T = document_ids_T
        self._on_host = document_ids_T if on_host is None else on_host
        self._biases: dict[int | None, Tensor] = {}
        self._state_plan: StatePlan | None = None
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def _bias(self, window: int | None, like: Tensor) -> Tensor:
        """What is added to scores, 0 or about -inf: (R or 1, L, L)."""
        if window not in self._biases:
            at_L = torch.arange(self._length, device=like.device)
            seen_RLL = visible(at_L, at_L, window).unsqueeze(0)
            if self._document_ids_T is not None:
                ids_RL = self._document_ids_T.view(-1, self._length)
                seen_RLL = seen_RLL & (ids_RL.unsqueeze(1) == ids_RL.unsqueeze(2))
            nothing_RLL = torch.zeros(seen_RLL.shape, dtype=like.dtype, device=like.device)
            self._biases[window] = nothing_RLL.masked_fill(~seen_RLL, torch.finfo(like.dtype).min)
        return self._biases[window]

    def attend(self, attention: Attention, qkv_TI: Tensor, rotation: Rotation) -> Tensor:
        """See moebius.nn.attention.Attends."""
        spec = attention.spec
        q_THN, k_TGN, v_TGN = self._heads(attention, qkv_TI, rotation)
        bias_RLL = self._bias(spec.window, q_THN)
        return self._over(
            q_THN * attention.scale, k_TGN, v_TGN, bias_RLL, spec.softcap, attention.sinks
        )

    def attend_latent(self, rows: LatentRows) -> Tensor:
        """See moebius.nn.mixers.latent.AttendsLatent."""
        mixer, q_THN, latent_TI, positions = rows
        rotation = positions.rotation(mixer.rotary)
        norm = mixer.kv_a_layernorm
        size = len(norm.weight)
        grows = mixer.spec.temperature
        q_THN = turned_queries(mixer.ops, q_THN, size, rotation, grows, positions.positions_T)
        k_T1N = latent_keys(mixer.ops, latent_TI, norm.weight, norm.eps, rotation)
        v_T1N = k_T1N[..., :size].contiguous()
        return self._over(q_THN * mixer.scale, k_T1N, v_T1N, self._bias(None, q_THN))

    def _over(
        self,
        q_THN: Tensor,
        k_TGN: Tensor,
        v_TGN: Tensor,
        bias_RLL: Tensor,
        softcap: float | None = None,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        """(T, H, value size): what queries, as they are scaled, find where the bias lets them."""
        tokens, heads, size = q_THN.shape
        groups = k_TGN.shape[1]
        rows_of = (-1, self._length, groups)
        # Query heads that share a key head stand side by side, as more queries of the same keys.
        q_RGLSN = q_THN.view(*rows_of, heads // groups, size).transpose(1, 2)
        k_RGNL = k_TGN.view(*rows_of, size).permute(0, 2, 3, 1)
        v_RGLN = v_TGN.view(*rows_of, v_TGN.shape[2]).transpose(1, 2)
        sinks_GS = None if sinks_H is None else sinks_H.view(groups, -1)
        blocks = []
        step = DEVICE_BLOCK if q_THN.is_cuda else QUERY_BLOCK
        for start in range(0, self._length, step):
            stop = min(start + step, self._length)
            blocks.append(
                _attend(
                    q_RGLSN[:, :, start:stop],
                    k_RGNL[..., :stop],
                    v_RGLN[:, :, :stop],
                    bias_RLL[:, start:stop, :stop],
                    softcap,
                    sinks_GS,
                )
            )
        out_RGLSN = torch.cat(blocks, dim=2)
        return out_RGLSN.transpose(1, 2).reshape(tokens, heads, out_RGLSN.shape[-1])

    def _heads(
        self, attention: Attention, qkv_TI: Tensor, rotation: Rotation
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q (T, H, N) and k (T, G, N), normed and rotated, ready to meet, and v (T, G, N)."""
        spec = attention.spec
        rows = attention.rows
        groups = spec.num_kv_heads
        value_size = spec.v_size // groups
        parts = rows.sizes(qkv_TI.shape[1], groups, spec.head_dim, value_size)
        q_TI, k_TI, v_TI = torch.split(qkv_TI, parts, dim=1)
        # Behind a head's queries stand its gates, where there are such.
        tokens = len(qkv_TI)
        of_head = parts[0] // spec.num_heads
        q_THN = q_TI.view(tokens, spec.num_heads, of_head)[..., : spec.head_dim]
        q_norm, k_norm = attention.head_norms or (None, None)
        q_THN = _turned(attention, q_THN, q_norm, rotation)
        if rows.queries_alone:
            return q_THN, *self._kept[attention.layer]
        k_TGN = k_TI.view(tokens, groups, spec.head_dim)
        v_TGN = k_TGN if rows.keys_as_values else v_TI.view(tokens, groups, value_size)
        if rows.normed_values:
            assert k_norm is not None, "whose eps is the values'"
            ones_N = torch.ones(value_size, device=v_TGN.device)
            v_TGN = attention.ops.rms_norm(v_TGN.contiguous(), ones_N, k_norm.eps)
        k_TGN = _turned(attention, k_TGN, k_norm, rotation)
        if rows.normed_values:  # other layers may attend over them
            self._kept[attention.layer] = (k_TGN, v_TGN)
        return q_THN, k_TGN, v_TGN

    def recur(self, mixer: Recurrent, x_TD: Tensor) -> Recurrence:
        """See moebius.nn.mixers.recurs.Recurs: nothing is kept."""
        if self._state_plan is None:
            starts = self._starts(len(x_TD))
            self._state_plan = mixer.ops.plan_documents(starts, x_TD.device)
        return Recurrence({}, self._state_plan)

    def _starts(self, tokens: int) -> list[int]:
        """The first token of each document, and behind them the number of tokens."""
        if self._on_host is None:
            return list(range(0, tokens + 1, self._length))
        ids_RL = self._on_host.view(-1, self._length)
        first_RL = torch.ones_like(ids_RL, dtype=torch.bool)
        first_RL[:, 1:] = ids_RL[:, 1:] != ids_RL[:, :-1]
        return [*first_RL.flatten().nonzero().flatten().tolist(), tokens]


def _turned(
    attention: Attention, x_THN: Tensor, norm: RMSNorm | None, rotation: Rotation
) -> Tensor:
    """Queries or keys, normed where there is a norm of each head, and rotated."""
    rotary = attention.ops.rotary
    if attention.rows.turned_first:
        x_THN = rotary(x_THN, rotation)
    if norm is not None:
        x_THN = norm(x_THN.contiguous())
    return x_THN if attention.rows.turned_first else rotary(x_THN, rotation)


def _attend(
    q_RGBSN: Tensor,
    k_RGNK: Tensor,
    v_RGKN: Tensor,
    bias_RBK: Tensor,
    softcap: float | None,
    sinks_GS: Tensor | None,
) -> Tensor:
    """One block of queries over the keys up to its end: (R, G, B, S, N)."""
    queries = q_RGBSN.shape[:4]
    scores_RGBSK = (q_RGBSN.flatten(2, 3) @ k_RGNK).view(*queries, k_RGNK.shape[3])
    if softcap is not None:
        scores_RGBSK = softcap * torch.tanh(scores_RGBSK / softcap)
    scores_RGBSK = scores_RGBSK + bias_RBK[:, None, :, None, :]
    if sinks_GS is None:
        weights_RGBSK = torch.softmax(scores_RGBSK, dim=-1)
    else:
        sinks_GBSK = sinks_GS[:, None, :, None].to(scores_RGBSK.dtype)
        with_sink = torch.cat(
            (scores_RGBSK, sinks_GBSK.expand(*scores_RGBSK.shape[:-1], 1)), dim=-1
        )
        weights_RGBSK = torch.softmax(with_sink, dim=-1)[..., :-1]
    return (weights_RGBSK.flatten(2, 3) @ v_RGKN).view(*queries, v_RGKN.shape[3])
