"""What is mapped into memory of experts that a rank holds, or that may stay on disk."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moebius.models.decoder import Decoder
from moebius.models.store import open_checkpoint
from moebius.models.store.load import Loader
from moebius.moe.experts import Experts
from moebius.moe.placement import LayerPlacement, Placement
from moebius.moe.ranks import ExpertRank
from moebius.ops.cpu import CpuOps
from moebius.pages import whole_pages
from tiny import write_model

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

CPU = torch.device("cpu")
EXPERTS = 6
# One expert's matrix of one layer, in bytes: 256 x 512 numbers.
MATRIX = 2 * 256 * 512
# A fault maps up to 64 KiB around it, at either end of what lies apart.
AROUND = 2 * 2**16


def resident(directory: Path) -> int:
    """Bytes of a model's files that are mapped into this process and present."""
    total = 0
    counts = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            counts = str(directory) in line
        elif counts and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def settled(directory: Path, done: Callable[[int], bool]) -> int:
    """What is resident once `done` says so: pages come on another thread."""
    until = time.monotonic() + 30
    while not done(found := resident(directory)) and time.monotonic() < until:
        time.sleep(0.005)
    return found


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    sizes = {"hidden_size": 512, "moe_intermediate_size": 256, "num_experts": EXPERTS}
    write_model(tmp_path, dtype=torch.bfloat16, **sizes)
    return tmp_path


def load(directory: Path, ranks: ExpertRank | None) -> tuple[Decoder, Loader]:
    checkpoint = open_checkpoint(directory)
    decoder = Decoder(checkpoint.config, CpuOps(1), torch.bfloat16, "meta", ranks=ranks)
    loader = Loader(checkpoint, CPU)
    loader.fill(decoder)
    return decoder, loader


def test_only_a_ranks_own_experts_are_present(directory: Path) -> None:
    """Before anything is computed, and while experts come and go. Two layers of three matrices."""
    size = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    of_experts = 2 * 3 * EXPERTS * MATRIX
    others = size - of_experts
    assert of_experts > 0.8 * size
    placement = Placement.linear({0: EXPERTS, 1: EXPERTS}, 3)
    decoder, loader = load(directory, ExpertRank(placement, 0, 8))
    own = 2 * 3 * 2 * MATRIX + others
    runs = 2 * 2 * 3 + 4
    assert own <= settled(directory, lambda found: found >= own) <= own + runs * AROUND < 0.6 * size

    # Expert 0 stays, 1 goes to another rank, and 2 to 4 come.
    held = ((0, 2, 3, 4), (1,), (5,))
    layers = {layer: LayerPlacement(EXPERTS, held) for layer in range(2)}
    loader.move_experts(decoder, loader.bring_experts(decoder, Placement(layers)))
    own += 2 * 3 * 2 * MATRIX
    assert own <= settled(directory, lambda found: found >= own) <= own + runs * AROUND < size
    loader.move_experts(decoder, loader.bring_experts(decoder, placement))
    own -= 2 * 3 * 2 * MATRIX
    most = own + runs * AROUND
    assert own - runs * AROUND <= settled(directory, lambda found: found <= most) <= most


def test_all_of_a_file_is_present_where_all_experts_are(directory: Path) -> None:
    """So that the test above can fail."""
    size = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    decoder, _ = load(directory, None)
    assert settled(directory, lambda found: found >= size) >= size
    del decoder
    assert settled(directory, lambda found: found == 0) == 0


def test_spans_become_the_pages_that_they_touch() -> None:
    assert whole_pages([(5, 9), (33, 34), (8, 17)], 8) == [(0, 24), (32, 40)]
    assert whole_pages([(0, 8), (8, 16)], 8) == [(0, 16)]
    assert whole_pages([]) == []


def test_experts_that_may_stay_on_disk_come_when_they_are_chosen(directory: Path) -> None:
    """Loading reads all else; a step reads the experts that its router chose."""
    size = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    others = size - 2 * 3 * EXPERTS * MATRIX
    checkpoint = open_checkpoint(directory)
    decoder = Decoder(checkpoint.config, CpuOps(1), torch.bfloat16, "meta")
    Loader(checkpoint, CPU, cold=True).fill(decoder)
    runs = 2 * 3 * 2
    before = settled(directory, lambda found: found >= others)
    assert others <= before <= others + runs * AROUND
    experts = next(each for each in decoder.modules() if isinstance(each, Experts))
    rows = torch.ones(3, 512, dtype=torch.bfloat16)
    chosen = torch.full((3, 1), 4)
    found = experts(rows, torch.ones(3, 1), chosen)
    # A part of them may be there already, and the kernel maps some of its neighbours too.
    assert 3 * MATRIX - AROUND <= resident(directory) - before <= 3 * 3 * MATRIX

    warm = Decoder(checkpoint.config, CpuOps(1), torch.bfloat16, "meta")
    Loader(checkpoint, CPU).fill(warm)
    same = next(each for each in warm.modules() if isinstance(each, Experts))
    assert torch.equal(found, same(rows, torch.ones(3, 1), chosen))
