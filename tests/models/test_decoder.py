"""A decoder of whatever layers its records describe: parameters, caches, positions, and a kind of
mixer that it has never heard of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moebius.errors import ConfigError
from moebius.models.config import LayerSpec, ModelConfig
from moebius.models.decoder import Decoder
from moebius.models.layout import Layout, sources
from moebius.moe.beside import DenseBeside
from moebius.moe.config import FeedForwardConfig
from moebius.nn.attention import GQA
from moebius.nn.linear import Linear
from moebius.nn.mixers.gated_delta import GatedDelta
from moebius.nn.mixers.normed_values import NormedValues
from moebius.nn.packed import PackedPast
from moebius.nn.paged import PagedPast
from moebius.nn.rope import Positions, RopeConfig
from moebius.nn.spec import Parameter, Parameters, Place
from moebius.ops import Operation, Pair, Use
from moebius.ops.cache_spec import CacheSpec, Plane
from moebius.ops.config import DeltaSizes, RouterConfig
from moebius.ops.reference import ReferenceOps
from moebius.ops.steps import StepInputs
from moebius.train.initial import init_weights
from oracle import Server, assert_close

D, V = 24, 40
ROPE = RopeConfig(100.0)
PLAIN = GQA(4, 2, 6, rope=ROPE)
DENSE = FeedForwardConfig(20)
ROUTED = FeedForwardConfig(
    16,
    RouterConfig(3, 2, logit_bias=True, selection_bias=True, learned_noise=True),
    bias=True,
    shared_width=8,
    shared_gate=True,
)


def model(*layers: LayerSpec, **different: Any) -> ModelConfig:
    return ModelConfig(**{
        "model_type": "test", "hidden_size": D, "vocab_size": V, "context": 64, "layers": layers, **different
    })  # fmt: skip


def made(config: ModelConfig, seed: int = 0) -> Decoder:
    """With random weights, biases and norms too."""
    decoder = Decoder(config, ReferenceOps())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return decoder


@torch.no_grad()
def logits(decoder: Decoder, ids: Sequence[int]) -> Tensor:
    at = torch.arange(len(ids))
    return decoder.logits(decoder(torch.tensor(ids), at, PackedPast(len(ids)))[0])


LAYERS = {
    "plain": LayerSpec(PLAIN, DENSE),
    "every bias and norm": LayerSpec(
        replace(PLAIN, qkv_bias=True, output_bias=True, qk_norm="head", sinks=True), ROUTED
    ),
    "sandwich, all heads normed": LayerSpec(replace(PLAIN, qk_norm="full"), DENSE, "sandwich"),
    "values of another size": LayerSpec(replace(PLAIN, value_dim=4), FeedForwardConfig(8, gated=False)),
    "outputs normed alone": LayerSpec(replace(PLAIN, qk_norm="turned"), ROUTED, "post"),
    "gates of values": LayerSpec(replace(PLAIN, gated="values", value_dim=4), DENSE),
    "gates of heads": LayerSpec(replace(PLAIN, gated="heads", gate_function="softplus"), DENSE),
    "gates behind queries": LayerSpec(replace(PLAIN, gated="queries"), DENSE),
    "gated delta": LayerSpec(GatedDelta(DeltaSizes(2, 4, 6, 5), projections="grouped"), ROUTED),
    "decay itself": LayerSpec(GatedDelta(DeltaSizes(2, 2, 6, 5), logarithm=False), DENSE),
    "both parts read one norm": LayerSpec(PLAIN, ROUTED, "parallel", 0.5),
    "a dense part beside experts, values that are keys": LayerSpec(
        NormedValues(4, 2, 6, rope=ROPE, qk_norm="head", keys_as_values=True),
        DenseBeside(16, RouterConfig(3, 2), shared_width=8), "sandwich", scaled=True),
    "keys of another layer": LayerSpec(NormedValues(4, 2, 6, rope=ROPE, qk_norm="head", kept_by=0), DENSE),
    "a mixer alone": LayerSpec(PLAIN, norms="sandwich"),
    "a feed-forward alone": LayerSpec(feed_forward=ROUTED, norms="sandwich"),
}  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
def test_records_say_which_parameters_modules_have(tied: bool) -> None:
    config = model(*LAYERS.values(), tie_word_embeddings=tied)
    decoder = Decoder(config, ReferenceOps(), torch.bfloat16)
    told = {s.parameter: (s.shape, s.float32) for s in sources(config, Layout())}
    there = {
        name: (tuple(p.shape), p.dtype == torch.float32) for name, p in decoder.named_parameters()
    }
    assert told == there


def test_a_layer_in_two_halves_is_the_whole_layer() -> None:
    whole = made(model(LayerSpec(PLAIN, ROUTED, residual_multiplier=0.7)))
    half = replace(whole.config.layers[0], feed_forward=None)
    halves = Decoder(model(half, LayerSpec(None, ROUTED, residual_multiplier=0.7)), ReferenceOps())
    state = {
        name.replace("layers.0", "layers.1" if "mlp" in name or "post_" in name else "layers.0"): p
        for name, p in whole.state_dict().items()
    }
    halves.load_state_dict(state)
    assert torch.equal(logits(whole, range(9)), logits(halves, range(9)))
    assert list(halves.routers) == [1] and list(whole.routers) == [0]


def test_layers_that_are_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="neither a mixer nor"):
        LayerSpec()
    with pytest.raises(ConfigError, match="num_layers is 0"):
        model()
    with pytest.raises(ConfigError, match="norms is 'both'; it must be one of pre, sandwich, post"):
        LayerSpec(PLAIN, norms="both")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="residual_multiplier goes with layers whose inputs"):
        LayerSpec(PLAIN, norms="post", residual_multiplier=0.5)
    for other in (LayerSpec(PLAIN, DENSE, "post"), LayerSpec(PLAIN)):
        with pytest.raises(ConfigError, match="a layer that is scaled has a feed-forward part"):
            replace(other, scaled=True)


class CountingOps(ReferenceOps):
    rotations = 0

    def rotation(self, positions_T: Tensor, inverse_R: Tensor, factor: float) -> Pair:
        self.rotations += 1
        return super().rotation(positions_T, inverse_R, factor)


def test_a_rotation_is_worked_out_once_a_step_for_each_rope() -> None:
    other, unturned = RopeConfig(9.0), replace(PLAIN, rope=None)
    mixers = [PLAIN, replace(PLAIN, rope=other), replace(PLAIN, window=2), unturned, unturned]
    ops = CountingOps()
    decoder = Decoder(model(*(LayerSpec(mixer, DENSE) for mixer in mixers)), ops)
    init_weights(decoder)
    for steps in (1, 2):
        logits(decoder, range(5))
        assert ops.rotations == 3 * steps


def test_what_each_layer_keeps_of_the_past_follows_from_its_mixer() -> None:
    near, wide = replace(PLAIN, window=4), replace(PLAIN, head_dim=8)
    order = [near, PLAIN, replace(near, rope=None), wide, PLAIN]
    config = model(*(LayerSpec(mixer, DENSE) for mixer in order), LayerSpec(feed_forward=DENSE))
    caches = config.caches(torch.bfloat16)
    assert [spec.window for spec in caches] == [4, None, 4, None, None, None]
    # 2 heads of keys and of values, 2 bytes each
    assert [spec.bytes_per_token for spec in caches] == [48, 48, 48, 64, 48, 0]
    assert [plane.shape for plane in caches[3].token] == [(2, 8), (2, 8)]
    assert caches[5] == CacheSpec()


# A kind of mixer as it would come: a recurrent one, y_t = W h_t with h_t = h_{t-1} / 2 + x_t.


@dataclass(frozen=True)
class Leaky:
    activations: int = 2 * D
    scores: int = 0

    def parameters(self, hidden_size: int) -> Parameters:
        yield Parameter("out_proj.weight", (hidden_size, hidden_size))

    def cache(self, dtype: torch.dtype, kv_dtype: torch.dtype | None = None) -> CacheSpec:
        return CacheSpec(state=(Plane("sum", (D,), torch.float32),))

    def uses(self, dtype: torch.dtype, kv_dtype: torch.dtype | None = None) -> Iterator[Use]:
        yield Use(Operation.LINEAR, dtype)

    def build(self, place: Place) -> LeakySum:
        return LeakySum(place)


class LeakySum(nn.Module):
    def __init__(self, place: Place) -> None:
        super().__init__()
        self.layer = place.layer
        self.out_proj = Linear(place.ops, place.hidden_size, place.hidden_size, dtype=place.dtype)

    def forward(self, x_TD: Tensor, positions: Positions, past: Any) -> Tensor:
        rows = []
        for slot, rows_TD in past.states(self.layer, x_TD):
            for x_D in rows_TD:
                slot.copy_(slot / 2 + x_D)
                rows.append(slot.clone())
        out_TD: Tensor = self.out_proj(torch.stack(rows))
        return out_TD


class PastWithStates(PagedPast):
    """What serving would keep: a state a sequence and layer, from zeros on."""

    kept: dict[tuple[int, int], Tensor]
    sequences: Sequence[int]

    def states(self, layer: int, x_TD: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        starts = self._step.query_start_host
        for number, sequence in enumerate(self.sequences):
            slot = self.kept.setdefault((layer, sequence), torch.zeros(D))
            yield slot, x_TD[starts[number] : starts[number + 1]]


def test_a_mixer_of_a_new_kind_needs_no_change_of_the_decoder() -> None:
    """Two sequences in chunks beside each other, through attention and a recurrence, against a loop
    over whole sequences that keeps nothing."""
    config = model(LayerSpec(Leaky(), DENSE), LayerSpec(PLAIN, ROUTED), LayerSpec(Leaky()))
    decoder = made(config)
    assert {"layers.2.self_attn.out_proj.weight"} <= {
        source.parameter for source in sources(config, Layout())
    }
    first, attends, last = config.caches(torch.float32)
    assert first == last != attends
    texts = {0: [3, 1, 4, 1, 5, 9, 2, 6], 1: [2, 7, 1, 8]}
    served = _serve(decoder, texts)
    for sequence, ids in texts.items():
        assert_close(served[sequence], _naive(decoder, ids), 1e-5)


def _serve(decoder: Decoder, texts: dict[int, list[int]]) -> dict[int, Tensor]:
    ops, attention = decoder.ops, decoder.config.layers[1].mixer
    assert isinstance(attention, GQA)
    spec = attention.cache(torch.float32)
    buffer = torch.zeros(ops.cache_bytes_per_block(spec, 4) * 4, dtype=torch.uint8)
    cache = ops.make_cache(buffer, spec, 4)
    blocks = {0: [2, 0], 1: [3]}
    done = {0: 0, 1: 0}
    kept: dict[tuple[int, int], Tensor] = {}
    out: dict[int, list[Tensor]] = {0: [], 1: []}
    for work in ([(0, 3)], [(1, 2), (0, 4)], [(0, 1), (1, 1)], [(1, 1)]):
        rows = [texts[s][done[s] : done[s] + count] for s, count in work]
        tables = [blocks[s] for s, _ in work]
        step = StepInputs.build(rows, [done[s] for s, _ in work], tables, 4)
        past = PastWithStates(ops, [None, cache, None], [0, 0, 0], step, 4)
        past.kept = kept
        past.sequences = [s for s, _ in work]
        with torch.no_grad():
            hidden, _ = decoder(step.input_ids, step.positions, past)
        parts = decoder.logits(hidden).split([count for _, count in work])
        for (sequence, count), part in zip(work, parts, strict=True):
            out[sequence].append(part.detach())
            done[sequence] += count
    return {sequence: torch.cat(parts) for sequence, parts in out.items()}


class NothingKept(PackedPast):
    def states(self, layer: int, x_TD: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        yield torch.zeros(D), x_TD


@torch.no_grad()
def _naive(decoder: Decoder, ids: list[int]) -> Tensor:
    past: Any = NothingKept(len(ids))
    hidden, _ = decoder(torch.tensor(ids), torch.arange(len(ids)), past)
    return decoder.logits(hidden)


@pytest.mark.parametrize("cap", [0.5, 30.0])
def test_capped_logits(cap: float) -> None:
    decoder = made(model(LayerSpec(PLAIN, DENSE), logits_divisor=3.0))
    plain = logits(decoder, range(6))
    decoder.config = replace(decoder.config, logits_softcap=cap)
    torch.testing.assert_close(logits(decoder, range(6)), cap * torch.tanh(plain / cap))


VARIANTS = {
    "no rope": replace(PLAIN, rope=None),
    "part of each head turns": replace(PLAIN, head_dim=8, rope=RopeConfig(100.0, partial=0.5)),
    "capped scores": replace(PLAIN, softcap=0.8, scale=1.0),
    "sinks": replace(PLAIN, sinks=True, window=3),
    "sinks and caps, one head of keys": GQA(4, 1, 6, rope=ROPE, sinks=True, softcap=2.0, scale=1.0),
    "all at once": replace(
        PLAIN, qk_norm="head", qkv_bias=True, output_bias=True, sinks=True, softcap=2.0, window=5
    ),
}


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_serving_attends_as_packed_rows_do(name: str, kernels: bool) -> None:
    from moebius.ops import select_ops

    config = model(LayerSpec(VARIANTS[name], DENSE), LayerSpec(VARIANTS[name], DENSE))
    packed = made(config)
    served = Decoder(config, select_ops("cpu", torch.float32) if kernels else ReferenceOps())
    served.load_state_dict(packed.state_dict())
    served.requires_grad_(False)
    ids = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
    server = Server(served, block_size=4, num_blocks=4)
    for chunk in (ids[:6], ids[6:10], ids[10:]):
        server.step([(0, chunk)])
    assert_close(server.all_logits(0), logits(packed, ids), 1e-5)
