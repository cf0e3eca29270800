"""Whether our kernels draw as plain PyTorch does, and whether a row draws alone as among others."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moebius.ops.draws import Draw
from moebius.ops.sampling import Shaping
from moebius.ops.triton.checked import CheckedOps
from moebius.ops.triton.inspector import far_apart, same_bits, why

_Draw = Callable[[Any, Tensor, Sequence[int]], Any]
"""Given operations, logits and rows of them: a token a row, or what tokens are made of."""


def sampling_failure(ops: CheckedOps, logits_LV: Tensor) -> str:
    """Why sampling from logits like these is not our kernels'; empty where it is."""
    try:
        return _failure(ops, logits_LV)
    except (torch.AcceleratorError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        return why(error)


def _failure(ops: CheckedOps, logits_LV: Tensor) -> str:
    rows = range(len(logits_LV))
    for draw in (_best, _drawn, _chosen, _shaped, _shaped_ahead, _ranked, _top):
        together = draw(ops, logits_LV.clone(), rows)
        wanted = draw(ops.reference, logits_LV.clone(), rows)
        what = draw.__name__.strip("_")
        reason = _apart(together, wanted)
        if reason:
            return f"{what}: {reason}"
        for row in rows:
            if not _alike(draw(ops, logits_LV.clone(), [row]), together, row, len(rows)):
                return f"{what}: a row alone has not the bits that it has among {len(rows)}"
    return ""


def _apart(found: Any, wanted: Any) -> str:
    if isinstance(found, list):
        return "" if found == wanted else "other tokens"
    pairs = zip(found, wanted, strict=True)
    return next(filter(None, (far_apart(one.float(), its.float()) for one, its in pairs)), "")


def _alike(alone: Any, together: Any, row: int, rows: int) -> bool:
    """Whether what a row gives alone is its part of what all give."""
    if isinstance(together, list):
        return bool(alone == together[row : row + 1])
    return all(
        same_bits(one, whole.view(rows, -1)[row])
        for one, whole in zip(alone, together, strict=True)
    )


def _best(ops: Any, logits_LV: Tensor, rows: Sequence[int]) -> list[int]:
    found: list[int] = ops.argmax(logits_LV, rows)
    return found


def _drawn(ops: Any, logits_LV: Tensor, rows: Sequence[int]) -> list[int]:
    heats = [0.5 + row % 3 for row in rows]
    uniforms = [(0.37 * (row + 1)) % 1 for row in rows]
    found: list[int] = ops.draw(logits_LV, rows, heats, uniforms)
    return found


def _chosen(ops: Any, logits_LV: Tensor, rows: Sequence[int]) -> list[int]:
    """By each kind of draw."""
    few = min(20, logits_LV.shape[1])
    kinds = (
        (0, False, 1.0, 0.0),
        (0, True, 1.0, 0.0),
        (few, True, 0.9, 0.01),
        (few, False, 0.5, 0.0),
    )
    draws = []
    for row in rows:
        width, heated, top_p, min_p = kinds[row % 4]
        heat = 0.5 + row % 3 if heated or width else 0.0
        draws.append(Draw(heat, (0.37 * (row + 1)) % 1, width, heated, top_p, min_p))
    found: list[int] = ops.choose(logits_LV, rows, draws).tolist()
    return found


def _shaped(ops: Any, logits_LV: Tensor, rows: Sequence[int]) -> list[int]:
    """Of logits with penalties, and a set of allowed ids."""
    shaping = _shaping(logits_LV.shape[1])
    allowed = np.full(-(-logits_LV.shape[1] // 32), 0x5555_5555, np.uint32)
    with ops.shaped(logits_LV, rows, [shaping._replace(allowed=allowed)] * len(rows)):
        return _drawn(ops, logits_LV, rows)


def _shaped_ahead(ops: Any, logits_LV: Tensor, rows: Sequence[int]) -> list[int]:
    """Of logits with penalties on an id that the device alone knows: one that was drawn before, one
    that was only read, one that is banned, one that is new."""
    newest_R = torch.tensor([(2, 1, 4, 3)[row % 4] for row in rows], device=logits_LV.device)
    shapings = [_shaping(logits_LV.shape[1])] * len(rows)
    with ops.shaped(logits_LV, rows, shapings, newest_R):
        return _drawn(ops, logits_LV, rows)


def _shaping(vocab: int) -> Shaping:
    return Shaping(
        bias={0: 0.5, vocab // 2: -0.5},
        seen=[1, vocab - 1],
        drawn=[0, 2, 2],
        repetition=1.5,
        presence=0.25,
        frequency=0.25,
        banned=[4],
    )


def _ranked(ops: Any, logits_LV: Tensor, rows: Sequence[int]) -> list[int]:
    ids = [(7 * row + 3) % logits_LV.shape[1] for row in rows]
    ids_R = torch.tensor(ids, device=logits_LV.device)
    found: list[int] = ops.ranks(logits_LV, rows, ids_R).tolist()
    return found


def _top(ops: Any, logits_LV: Tensor, rows: Sequence[int]) -> tuple[Tensor, ...]:
    """Sums, and the largest logits; which ids these have is a matter of ties no more."""
    few = min(20, logits_LV.shape[1])
    return tuple(ops.log_softmax_top_k(logits_LV, rows, [few] * len(rows)))
