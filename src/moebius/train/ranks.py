"""The processes that torchrun started to train one model, and what they tell each other.

Every exchange has a time limit, after which it raises PeerError. Nothing is pickled: what is not a
tensor goes as JSON in a frame of one size.
"""

import json
import os
import re
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from moebius.errors import (
    ERRORS_BY_CODE,
    ConfigError,
    MoebiusError,
    PeerError,
    StorageError,
    in_one_line,
    require_seconds,
)

T = TypeVar("T")

TIMEOUT = 300.0
# Of what a rank tells the others in words: a name, an error.
_FRAME_BYTES = 4096
_LONGEST_TEXT = 600
# How often rank 0, at work for all of them, shows the others that it is there.
_PULSE_SECONDS = 1.0


class Ranks:
    """This process among `count` of them; alone, nothing is exchanged.

    timeout     seconds that ranks wait for each other
    """

    def __init__(
        self,
        rank: int = 0,
        count: int = 1,
        *,
        device: torch.device | str = "cpu",
        timeout: float = TIMEOUT,
    ) -> None:
        self.rank = rank
        self.count = count
        self.device = torch.device(device)
        self.timeout = timeout

    @classmethod
    def join(cls, device: torch.device, timeout: float = TIMEOUT) -> "Ranks":
        """The group that torchrun's environment describes: gloo on CPUs, NCCL on GPUs.

        Raises ConfigError where the others are not found in time.
        """
        require_seconds("--rank-timeout", timeout)
        count = int(os.environ.get("WORLD_SIZE", "1"))
        if count == 1:
            return cls(device=device)
        rank = os.environ.get("RANK", "?")
        backend = "gloo"
        where_computed = None
        if device.type == "cuda":
            backend = "nccl"
            where_computed = device
            torch.cuda.set_device(device)
            # A wait that the time limit ends raises an error, where else the process is aborted.
            os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
        try:
            dist.init_process_group(
                backend, timeout=timedelta(seconds=timeout), device_id=where_computed
            )
        except (RuntimeError, ValueError) as error:
            where = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
            raise ConfigError(
                f"rank {rank} of {count} on {socket.gethostname()} found no group of {count} at "
                f"{where} within {timeout:g} s: {_cause(error)}"
            ) from None
        return cls(dist.get_rank(), count, device=device, timeout=timeout)

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.count} on {socket.gethostname()}"

    def all_reduce(self, *tensors: Tensor) -> None:
        """Replace each tensor by the sum over all ranks, the same bits on each."""
        if self.count > 1:
            with self._others():
                for tensor in tensors:
                    dist.all_reduce(tensor)

    def all_reduce_max(self, *values: float) -> list[float]:
        """The greatest of each value over all ranks."""
        if self.count == 1:
            return list(values)
        found = torch.tensor(values, dtype=torch.float64, device=self.device)
        with self._others():
            dist.all_reduce(found, dist.ReduceOp.MAX)
        return found.tolist()

    def all_to_all(
        self, sent: Tensor, counts_to: Sequence[int], counts_from: Sequence[int]
    ) -> Tensor:
        """Rows of `sent` to each rank in order, so many; those that come from each, in order."""
        received = sent.new_empty((sum(counts_from), *sent.shape[1:]))
        with self._others():
            dist.all_to_all_single(received, sent, list(counts_from), list(counts_to))
        return received

    def all_gather(self, counts: Tensor) -> Tensor:
        """Every rank's counts, in the order of ranks (ranks, ...)."""
        found = counts.new_empty((self.count * len(counts), *counts.shape[1:]))
        with self._others():
            dist.all_gather_into_tensor(found, counts.contiguous())
        return found.view(self.count, *counts.shape)

    def all_gather_json(self, what: Any) -> list[Any]:
        """What each rank gives, in the order of ranks: a few words, of which JSON is made."""
        if self.count == 1:
            return [what]
        # A name of a file may hold what is no text: it goes as JSON's escape for it.
        said = json.dumps(what, ensure_ascii=False).encode(errors="backslashreplace")
        assert len(said) <= _FRAME_BYTES, "a frame is for a few words"
        frame = torch.frombuffer(bytearray(said.ljust(_FRAME_BYTES)), dtype=torch.uint8)
        frames = self.all_gather(frame.to(self.device)).cpu()
        return [json.loads(bytes(each.tolist())) for each in frames]

    def together(self, work: Callable[[], T]) -> T:
        """What `work` returns. What it raises at any rank, all ranks raise, the lowest rank's."""
        if self.count == 1:
            return work()
        failed: MoebiusError | OSError | None = None
        try:
            result = work()
        except PeerError:
            raise
        except (MoebiusError, OSError) as error:
            failed = error
        told = None if failed is None else [_code(failed), self._own_words(failed)]
        for each in self.all_gather_json(told):
            if each is not None:
                code, text = each
                raise ERRORS_BY_CODE.get(code, MoebiusError)(text) from failed
        return result

    def lead(self, work: Callable[[], T]) -> T | None:
        """Do `work` at rank 0 alone, and return what it returned there; None elsewhere.

        The others wait, however long it takes, while rank 0 shows that it is there. What it raises
        all ranks raise.
        """
        if self.count == 1:
            return work()
        if self.rank:
            while self.all_reduce_max(0.0)[0]:
                pass
            return self.together(lambda: None)
        with ThreadPoolExecutor(1) as thread:
            doing = thread.submit(work)
            working = True
            while working:
                wait_for([doing], min(_PULSE_SECONDS, self.timeout / 4))
                working = not doing.done()
                self.all_reduce_max(float(working))
        return self.together(doing.result)

    def require_same(self, facts: Mapping[str, str | int]) -> None:
        """ConfigError, the same at all ranks, where one has other facts than rank 0: all of them
        in one line."""
        told = self.all_gather_json([str(self), dict(facts)])
        first, ours = told[0]
        for who, theirs in told[1:]:
            names = [name for name in ours | theirs if theirs.get(name) != ours.get(name)]
            if names:
                raise ConfigError(
                    f"{who} has {_told(theirs, names)}, but {first} has {_told(ours, names)}; all "
                    "ranks must be started alike"
                )

    def leave(self) -> None:
        if self.count > 1:
            dist.destroy_process_group()

    def _own_words(self, error: MoebiusError | OSError) -> str:
        return f"{self}: {in_one_line(error)}"[:_LONGEST_TEXT]

    @contextmanager
    def _others(self) -> Iterator[None]:
        """PeerError where the others do not do their part."""
        try:
            yield
        except RuntimeError as error:
            others = tuple(rank for rank in range(self.count) if rank != self.rank)
            raise PeerError(
                f"{self}: of ranks {', '.join(map(str, others))} one or more ended, or did not "
                f"come within {self.timeout:g} s ({_cause(error)})",
                ranks=others,
            ) from None


def _told(facts: Mapping[str, str | int], names: Sequence[str]) -> str:
    return ", ".join(f"{name} {facts.get(name)}" for name in names)


def _code(error: MoebiusError | OSError) -> str:
    return StorageError.wire_code if isinstance(error, OSError) else error.wire_code


def _cause(error: Exception) -> str:
    """What torch or gloo says, without the place in their sources and their advice."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[\S+:\d+\] ", "", line).partition(". ")[0].removesuffix(".")
