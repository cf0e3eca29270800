"""What a backend says of an operation before anybody asks it to compute one."""

from dataclasses import dataclass
from enum import StrEnum

import torch


class Operation(StrEnum):
    """The operations of a step, each named like the method of `Ops`."""

    EMBED = "embed"
    LINEAR = "linear"
    LOGITS = "logits"
    RMS_NORM = "rms_norm"
    ADD_RMS_NORM = "add_rms_norm"
    RMS_NORM_PART = "rms_norm_part"
    CLIP = "clip"
    DIVIDE = "divide"
    SOFTCAP = "softcap"
    ROTATION = "rotation"
    ROTARY = "rotary"
    ROTATE_AND_STORE = "rotate_and_store"
    PAGED_ATTENTION = "paged_attention"
    ROUTE = "route"
    EXPERTS = "experts"
    EXPERT_ROWS = "expert_rows"
    COMBINE = "combine"
    ADD_GATED = "add_gated"
    CAUSAL_CONV = "causal_conv"
    GATED_DELTA = "gated_delta"
    KIMI_DELTA = "kimi_delta"
    SELECTIVE_SCAN = "selective_scan"
    GATED_NORM = "gated_norm"
    GROUPED_NORM = "grouped_norm"
    GATE_HEADS = "gate_heads"
    HEAD_PRODUCTS = "head_products"
    ROTATE_AND_STORE_LATENT = "rotate_and_store_latent"
    WITHIN_CAPACITY = "within_capacity"
    SAMPLING = "sampling"


class Feature(StrEnum):
    """What an operation may be asked for beyond its plain form."""

    TWO_MATRICES = "experts without a matrix beside the gate"
    WINDOW = "a window of attention"
    SOFTCAP = "capped attention scores"
    SINKS = "attention sinks"
    VALUE_SIZE = "values of another size than keys"
    BIAS = "biases by distance"
    INT8_CACHE = "keys and values in 8 bits"
    LATENT = "latents for keys and values"


@dataclass(frozen=True, slots=True)
class Use:
    """An operation as a model of `dtype` asks for it, whatever its weights' formats.

    Rotations, routers, logits' caps and divisors, and sampling are float32 in any model.
    """

    operation: Operation
    dtype: torch.dtype
    features: frozenset[Feature] = frozenset()

    def __str__(self) -> str:
        wishes = "".join(f" with {feature}" for feature in sorted(self.features))
        return f"{self.operation} in {str(self.dtype).removeprefix('torch.')}{wishes}"


@dataclass(frozen=True, slots=True)
class Capability:
    """How a backend computes one use of an operation.

    by                name of the backend whose code it is: another's where it falls back
    batch_invariant   a row's bits depend on the row alone (promise P1): not on the other rows,
                      their number, the threads, or where the cache holds its tokens
    recorded          it may be part of a recorded step
    """

    by: str
    batch_invariant: bool
    recorded: bool
