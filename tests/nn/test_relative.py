"""Buckets of distances against transformers', and what their sizes may be."""

from __future__ import annotations

import pytest
import torch
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersAttention,
)

from moebius.errors import ConfigError
from moebius.models.encoder_decoder import EncoderDecoder
from moebius.nn.mixers.relative import Buckets, Heads, RelativeAttention, RelativeBias
from moebius.ops.reference import ReferenceOps
from tiny_t5 import save


@pytest.mark.parametrize(("count", "most"), [(32, 128), (8, 20), (4, 3), (64, 1000), (32, 17)])
@pytest.mark.parametrize("both_sides", [True, False])
def test_distances_share_the_buckets_of_transformers(
    count: int, most: int, both_sides: bool
) -> None:
    distance = torch.arange(-3 * most, 3 * most + 1)
    theirs = SwitchTransformersAttention._relative_position_bucket(
        distance, both_sides, count, most
    )
    ours = Buckets(count, most).of(distance, both_sides=both_sides)
    assert torch.equal(ours, theirs)
    # What the table rests on: farther than that, all are alike.
    assert len(set(ours[distance <= -most].tolist())) == 1
    assert len(set(ours[distance >= most].tolist())) == 1


def test_the_table_has_a_bias_for_each_distance_and_head() -> None:
    spec = RelativeAttention(Heads(3, 5), Buckets(8, 20), encoder=True, biases=True)
    bias = RelativeBias(spec)
    torch.nn.init.normal_(bias.weight)
    with torch.no_grad():
        table = bias.table()
        assert table.shape == (3, 41) and table is bias.table()
        for distance in (-20, -7, 0, 1, 20):
            bucket = spec.buckets.of(torch.tensor([distance]), both_sides=True)
            assert torch.equal(table[:, distance + 20], bias.weight[bucket[0]])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Buckets(6, 128), "num_buckets is 6; it must be a multiple of 4"),
        (lambda: Buckets(2, 128), "num_buckets is 2"),
        (lambda: Buckets(32, 16), "max_distance is 16; it must be more than 16"),
        (lambda: Heads(0, 5), "num_heads is 0"),
        (lambda: RelativeAttention(Heads(1, 2)).cache(torch.float32, torch.int8), "int8 does not"),
    ],
)
def test_sizes_that_mean_nothing_are_refused(make, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()


def test_a_past_that_knows_of_no_encoder_is_refused(tmp_path) -> None:
    from moebius.models.store.load import load_decoder
    from moebius.nn.packed import PackedPast

    save(tmp_path, "t5")
    model = load_decoder(tmp_path, torch.float32, ops=ReferenceOps())
    assert isinstance(model, EncoderDecoder)
    with pytest.raises(TypeError, match="PackedPast knows of no encoder"):
        model(torch.tensor([1, 2]), torch.arange(2), PackedPast(2))
