"""What a layer keeps of the past: the facts by which its memory is planned, shared and moved."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moebius.errors import ConfigError, require


@dataclass(frozen=True, slots=True)
class Plane:
    """One tensor of a cache: `shape` and dtype of what it holds for one token, or for one state."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """One layer's cache. Layers with equal specs form a group, with one block table for each.

    token          planes that grow by one entry a token of the decoder (keys and values apart)
    window         how many last tokens a row sees, itself included; None for all. Blocks before
                   are free again
    state          planes that a sequence has one of, which each of its tokens rewrites
    scratch_states how many states more a sequence may need at a time (one for each drafted token,
                   so that a rejected one can be undone)
    """

    token: tuple[Plane, ...] = ()
    window: int | None = None
    state: tuple[Plane, ...] = ()
    scratch_states: int = 0

    def __post_init__(self) -> None:
        require(
            self.window is None or self.window >= 1,
            f"a cache's window is {self.window} tokens; it must be at least 1",
        )
        require(
            self.window is None or bool(self.token),
            "a cache has a window, but no plane that grows with tokens",
        )
        require(
            not self.scratch_states or bool(self.state),
            "a cache has scratch states, but no state",
        )

    @property
    def bytes_per_token(self) -> int:
        return sum(plane.nbytes for plane in self.token)

    @property
    def bytes_per_state(self) -> int:
        return sum(plane.nbytes for plane in self.state)


_LATENT = ["latent", "turned"]


def holds_latents(spec: CacheSpec) -> bool:
    """Whether each token's values are the first ones of its key, and held once."""
    return [plane.name for plane in spec.token] == _LATENT


def key_value_planes(spec: CacheSpec) -> tuple[Plane, Plane]:
    """The planes of attention's keys (G, N) and values (G, Nv); int8 ones have their scales (G,)
    in float16 behind them. Of latents, what attention takes for such. Raises ConfigError for
    others."""
    names = [plane.name for plane in spec.token]
    if names == _LATENT:
        latent, turned = spec.token
        if latent.dtype == torch.int8:
            raise ConfigError("latents are held as they are computed, not as codes of 8 bits")
        size = latent.shape[1] + turned.shape[1]
        return Plane("k", (1, size), latent.dtype), Plane("v", latent.shape, latent.dtype)
    if names not in (["k", "v"], ["k", "v", "k_scale", "v_scale"]):
        raise ConfigError(f"attention keeps planes k and v of each token, not {names}")
    keys, values, *scales = spec.token
    if keys.dtype != values.dtype or keys.shape[:1] != values.shape[:1] or len(keys.shape) != 2:
        raise ConfigError(f"attention's keys and values do not go together: {keys}, {values}")
    wanted = [(keys.shape[:1], torch.float16)] * 2 if keys.dtype == torch.int8 else []
    if [(scale.shape, scale.dtype) for scale in scales] != wanted:
        raise ConfigError(f"attention's keys in {keys.dtype} do not go with the scales {scales}")
    return keys, values


def key_value_spec(
    num_kv_heads: int,
    key_size: int,
    dtype: torch.dtype,
    value_size: int | None = None,
    window: int | None = None,
) -> CacheSpec:
    """What grouped-query attention keeps: keys (G, N) and values (G, Nv) of each token, and where
    they are int8 a scale of each head's."""
    keys = Plane("k", (num_kv_heads, key_size), dtype)
    values = Plane("v", (num_kv_heads, key_size if value_size is None else value_size), dtype)
    scales: tuple[Plane, ...] = ()
    if dtype == torch.int8:
        names = ("k_scale", "v_scale")
        scales = tuple(Plane(name, (num_kv_heads,), torch.float16) for name in names)
    return CacheSpec(token=(keys, values, *scales), window=window)


def latent_spec(size: int, turned_size: int, dtype: torch.dtype) -> CacheSpec:
    """What latent attention keeps of a token: its latent, and behind it the part of its key that
    turns, which all heads share. Both are its key, and the latent alone its value."""
    latent, turned = _LATENT
    return CacheSpec(
        token=(Plane(latent, (1, size), dtype), Plane(turned, (1, turned_size), dtype))
    )


def check_key_offset(spec: CacheSpec, key_offset_GN: Tensor | None) -> None:
    """ValueError for an offset of keys that are not codes, or one of another shape or dtype."""
    keys, _ = key_value_planes(spec)
    if key_offset_GN is None:
        return
    if keys.dtype != torch.int8:
        raise ValueError(f"keys in {keys.dtype} are held as they are, less no offset")
    if key_offset_GN.shape != keys.shape or key_offset_GN.dtype != torch.float32:
        raise ValueError(
            f"keys' offset is {tuple(key_offset_GN.shape)} in {key_offset_GN.dtype}; it must be "
            f"{keys.shape} in torch.float32"
        )
