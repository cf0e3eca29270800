"""How ranks trade the rows of a step's tokens: each to the ranks that hold its experts, and back.

Every rank calls the same operations in the same order, those with nothing to do with no rows:

    agree, then for each layer: dispatch, combine; where all can, gather, scatter; and again

Bits are moved and never computed with: each (token, choice) pair has one row, which is made where
its expert is and comes home as it is, so that what home sums does not depend on who computed it.

Shapes: T tokens of this rank, R rows received, C rows of the owners table, E experts, K choices a
token, D hidden size, G gathered rows of this rank, V columns of their results.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moebius.errors import ConfigError, PeerError, require_seconds
from moebius.parallel.traffic import Traffic

MOST_RANKS = 1024
MOST_VALUES = 16
"""How many numbers a rank may bring to `Exchange.agree`."""

_VERSION = 1
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True)
class ExchangeSpec:
    """What all ranks of a group have in common.

    size        how many ranks
    tokens      T of a rank's largest step
    hidden      D
    top_k       K
    dtype       of the rows
    gathered    G at most; 0: none are gathered
    width       V
    """

    size: int
    tokens: int
    hidden: int
    top_k: int
    dtype: torch.dtype
    gathered: int = 0
    width: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.size <= MOST_RANKS:
            raise ConfigError(f"a group of {self.size} ranks; it must have 1 to {MOST_RANKS}")
        for name in ("tokens", "hidden", "top_k"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.gathered <= self.tokens or self.width < 0:
            raise ConfigError(
                f"{self.gathered} rows of {self.tokens} are to be gathered for {self.width} columns"
            )
        if self.dtype not in DTYPES:
            known = ", ".join(str(dtype) for dtype in DTYPES)
            raise ConfigError(f"rows of {self.dtype} cannot be exchanged; they must be {known}")

    @property
    def row_bytes(self) -> int:
        return self.hidden * self.dtype.itemsize

    def columns(self, rank: int) -> range:
        """Of V, those that a rank makes of every gathered row."""
        return columns_of(self.width, self.size, rank)


def columns_of(width: int, ranks: int, rank: int) -> range:
    """A rank's share of so many columns, whole cache lines of float32; ExchangeLayout::column."""

    def first(of: int) -> int:
        return width if of == ranks else width * of // ranks // 16 * 16

    return range(first(rank), first(rank + 1))


@dataclass(frozen=True, slots=True)
class Epoch:
    """A membership of a group: a rank that comes or goes makes the next one.

    names   of its ranks, for a person: an epoch's are counted from 0, whoever is gone
    """

    group: str
    number: int
    names: tuple[str, ...] = field(default=(), compare=False)

    def __str__(self) -> str:
        return f"epoch {self.number} of group {self.group}"

    def told(self, ranks: Sequence[int]) -> str:
        """Ranks, for a person."""
        names = dict(enumerate(self.names))
        return ", ".join(names.get(rank, f"rank {rank}") for rank in ranks)

    def lost(self, ranks: Sequence[int], what: str | None = None) -> PeerError:
        """That it goes on no longer because of these ranks: what they did, where that is known."""
        told = self.told(ranks)
        lost = "is lost" if len(ranks) == 1 else "are lost"
        return PeerError(f"{self}: {told} {what or lost}", ranks=tuple(ranks))


def identity(spec: ExchangeSpec, epoch: Epoch) -> dict[str, int]:
    """What ranks must have in common to exchange rows, as numbers of 64 bits."""
    group = hashlib.blake2b(epoch.group.encode(), digest_size=8).digest()
    return {
        "version": _VERSION,
        "group": int.from_bytes(group, signed=True),
        "epoch": epoch.number,
        "tokens": spec.tokens,
        "hidden": spec.hidden,
        "top_k": spec.top_k,
        "dtype": DTYPES.index(spec.dtype),
        "gathered": spec.gathered,
        "width": spec.width,
    }


def check_alike(
    spec: ExchangeSpec, epoch: Epoch, rank: int, found: Iterable[tuple[int, ...]]
) -> None:
    """ConfigError where a rank has said another `identity` than this one's."""
    mine = identity(spec, epoch)
    for other, theirs in enumerate(found):
        if theirs != tuple(mine.values()):
            named = dict(zip(mine, theirs, strict=False))
            unlike = ", ".join(name for name, value in mine.items() if named.get(name) != value)
            raise ConfigError(f"{epoch}: {epoch.told((rank, other))} differ in {unlike}")


class Exchange(ABC):
    """One rank's part in a group, for one epoch.

    timeout     seconds that any operation waits for other ranks. After that it raises PeerError,
                and so does every later one: the epoch is over.

    The operations are called from one thread, and return when their outputs are written. What they
    raise ValueError for they refuse before anything is sent, so that the call can be made again.
    """

    gathers = False
    """Whether rows can be gathered. Their results are so many bytes that only memory carries them
    faster than each rank would make them itself."""

    def __init__(self, spec: ExchangeSpec, rank: int, epoch: Epoch, timeout: float) -> None:
        if not 0 <= rank < spec.size:
            raise ConfigError(f"rank {rank} of a group of {spec.size}; it must be below that")
        require_seconds("timeout", timeout)
        self.spec = spec
        self.rank = rank
        self.epoch = epoch
        self.timeout = timeout

    @property
    def size(self) -> int:
        return self.spec.size

    @property
    @abstractmethod
    def traffic(self) -> Traffic: ...

    @abstractmethod
    def agree(self, values: Sequence[int]) -> list[tuple[int, ...]]:
        """Every rank's values, in the order of ranks.

        values   at most MOST_VALUES integers of 64 bits; ranks may bring different numbers of them

        Raises ValueError for more; PeerError.
        """

    @abstractmethod
    def dispatch(
        self, x_TD: Tensor, ids_TK: Tensor, owners_CE: Tensor, rows_RD: Tensor, ids_RK: Tensor
    ) -> int:
        """Sends each row of x once to every rank that holds any of its experts.

        x_TD        T may be 0
        ids_TK      int64, the experts of each row, in routing order
        owners_CE   int32: the rank that computes expert e of row t is owners[t % C, e], so that
                    replicas of an expert split its rows
        rows_RD     written: what this rank has to compute, in the order (home rank, home row); has
                    memory for size * spec.tokens rows
        ids_RK      written, int64: the experts of each received row, and E where another rank
                    computes that choice

        Returns R, the rows received; memory beyond them is left alone.
        Raises ValueError for tensors of other shapes or dtypes, and for ids and owners out of
        range; PeerError.
        """

    @abstractmethod
    def combine(self, outputs_RKD: Tensor, back_TKD: Tensor) -> None:
        """Brings the outputs of the last dispatch's rows home.

        outputs_RKD   a row for each choice that ids_RK names an expert of; others are not read
        back_TKD      written: all pairs' rows of this rank's own tokens

        Raises ValueError as `dispatch` does; PeerError.
        """

    def gather(self, x_GD: Tensor, rows_RD: Tensor) -> int:
        """Brings all ranks' rows to every rank.

        x_GD      G may be 0
        rows_RD   written: the rows of all, in the order of ranks; has memory for size *
                  spec.gathered

        Returns R. Raises ValueError as `dispatch` does; PeerError; RuntimeError where nothing can
        be gathered.
        """
        raise RuntimeError(f"a {type(self).__name__} gathers no rows")

    def scatter(self, parts_RW: Tensor, back_GV: Tensor) -> None:
        """Brings home what was made of the rows that the last `gather` brought.

        parts_RW   float32, contiguous: this rank's columns (ExchangeSpec.columns) of each row
        back_GV    float32, written: all columns of this rank's own rows

        Raises as `gather` does.
        """
        raise RuntimeError(f"a {type(self).__name__} gathers no rows")

    @abstractmethod
    def close(self) -> None:
        """Leaves the group; whoever waits for this rank learns of it at once, where it can."""

    def give_up(self, ranks: Sequence[int]) -> None:
        """Ends the epoch, from any thread: what waits here raises a PeerError that names these
        ranks, and so does every later call. Other ranks learn of it where the transport can tell
        them; a transport that knows no better leaves the group."""
        self.close()

    @property
    def _late(self) -> str:
        return f"did not come within {self.timeout:g} s"

    def _out_of_step(self, others: Sequence[int]) -> PeerError:
        own = self.epoch.told((self.rank,))
        what = f"did something else than {own} at the same point of a step"
        return self.epoch.lost(others, what)

    def _check_dispatch(
        self, x_TD: Tensor, ids_TK: Tensor, owners_CE: Tensor, rows_RD: Tensor, ids_RK: Tensor
    ) -> None:
        spec = self.spec
        tokens = x_TD.shape[0]
        room = rows_RD.shape[0]
        most = spec.size * spec.tokens
        if tokens > spec.tokens:
            raise ValueError(f"x has {tokens} rows; the group was made for {spec.tokens} a rank")
        if room < most:
            raise ValueError(f"there is room for {room} received rows; {most} may come")
        if 0 in owners_CE.shape:
            raise ValueError(f"an owners table of shape {tuple(owners_CE.shape)}")
        _check("x", x_TD, (tokens, spec.hidden), spec.dtype)
        _check("ids", ids_TK, (tokens, spec.top_k), torch.int64)
        _check("owners", owners_CE, (owners_CE.shape[0], owners_CE.shape[-1]), torch.int32)
        _check("received rows", rows_RD, (room, spec.hidden), spec.dtype)
        _check("received ids", ids_RK, (room, spec.top_k), torch.int64)

    def _check_combine(
        self, outputs_RKD: Tensor, back_TKD: Tensor, received: int, tokens: int
    ) -> None:
        spec = self.spec
        rows = outputs_RKD.shape[0]
        if rows < received:
            raise ValueError(f"outputs have {rows} rows; {received} were received")
        _check("outputs", outputs_RKD, (rows, spec.top_k, spec.hidden), spec.dtype)
        _check("back", back_TKD, (tokens, spec.top_k, spec.hidden), spec.dtype)

    def _check_gather(self, x_GD: Tensor, rows_RD: Tensor) -> None:
        spec = self.spec
        rows = x_GD.shape[0]
        room = rows_RD.shape[0]
        most = spec.size * spec.gathered
        if rows > spec.gathered:
            raise ValueError(f"{rows} rows are to be gathered; there may be {spec.gathered} a rank")
        if room < most:
            raise ValueError(f"there is room for {room} gathered rows; {most} may come")
        _check("x", x_GD, (rows, spec.hidden), spec.dtype)
        _check("gathered rows", rows_RD, (room, spec.hidden), spec.dtype)

    def _check_scatter(self, parts_RW: Tensor, back_GV: Tensor, gathered: int, rows: int) -> None:
        spec = self.spec
        found = parts_RW.shape[0]
        if found < gathered:
            raise ValueError(f"parts have {found} rows; {gathered} were gathered")
        _check("parts", parts_RW, (found, len(spec.columns(self.rank))), torch.float32)
        _check("back", back_GV, (rows, spec.width), torch.float32)


class CheckedExchange(Exchange):
    """What transports share: calls are checked before they come to `_agree`, `_dispatch` and
    `_combine`, to `_gather` and `_scatter` where they gather, and once a peer is lost every call
    says so again."""

    def __init__(self, spec: ExchangeSpec, rank: int, epoch: Epoch, timeout: float) -> None:
        super().__init__(spec, rank, epoch, timeout)
        self._over: PeerError | None = None
        # What has to follow, between dispatch and combine, or gather and scatter; with the rows
        # received, and this rank's own.
        self._second = ""
        self._rows = (0, 0)

    def agree(self, values: Sequence[int]) -> list[tuple[int, ...]]:
        self._begin()
        if len(values) > MOST_VALUES:
            raise ValueError(f"{len(values)} values; ranks can agree on {MOST_VALUES}")
        try:
            return self._agree(values)
        except PeerError as error:
            self._over = error
            raise

    def dispatch(
        self, x_TD: Tensor, ids_TK: Tensor, owners_CE: Tensor, rows_RD: Tensor, ids_RK: Tensor
    ) -> int:
        self._begin()
        self._check_dispatch(x_TD, ids_TK, owners_CE, rows_RD, ids_RK)
        try:
            received = self._dispatch(x_TD, ids_TK, owners_CE, rows_RD, ids_RK)
        except PeerError as error:
            self._over = error
            raise
        self._second = "combine"
        self._rows = (received, x_TD.shape[0])
        return received

    def combine(self, outputs_RKD: Tensor, back_TKD: Tensor) -> None:
        self._begin("combine")
        self._check_combine(outputs_RKD, back_TKD, *self._rows)
        try:
            self._combine(outputs_RKD, back_TKD)
        except PeerError as error:
            self._over = error
            raise
        self._second = ""

    def gather(self, x_GD: Tensor, rows_RD: Tensor) -> int:
        if not self.gathers:
            return super().gather(x_GD, rows_RD)
        self._begin()
        self._check_gather(x_GD, rows_RD)
        try:
            gathered = self._gather(x_GD, rows_RD)
        except PeerError as error:
            self._over = error
            raise
        self._second = "scatter"
        self._rows = (gathered, x_GD.shape[0])
        return gathered

    def scatter(self, parts_RW: Tensor, back_GV: Tensor) -> None:
        if not self.gathers:
            return super().scatter(parts_RW, back_GV)
        self._begin("scatter")
        self._check_scatter(parts_RW, back_GV, *self._rows)
        try:
            self._scatter(parts_RW, back_GV)
        except PeerError as error:
            self._over = error
            raise
        self._second = ""

    def close(self) -> None:
        self._over = self._over or self.epoch.lost((self.rank,), "has left it")

    @abstractmethod
    def _agree(self, values: Sequence[int]) -> list[tuple[int, ...]]: ...

    @abstractmethod
    def _dispatch(
        self, x_TD: Tensor, ids_TK: Tensor, owners_CE: Tensor, rows_RD: Tensor, ids_RK: Tensor
    ) -> int: ...

    @abstractmethod
    def _combine(self, outputs_RKD: Tensor, back_TKD: Tensor) -> None: ...

    def _gather(self, x_GD: Tensor, rows_RD: Tensor) -> int:
        raise NotImplementedError

    def _scatter(self, parts_RW: Tensor, back_GV: Tensor) -> None:
        raise NotImplementedError

    def _begin(self, second: str = "") -> None:
        """`second`: of two operations that belong together the second."""
        if self._over is not None:
            raise PeerError(str(self._over), ranks=self._over.ranks)
        if second != self._second:
            raise RuntimeError("combine follows dispatch, scatter gather, and nothing else does")


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
        raise ValueError(
            f"{name}: {tensor.dtype} of shape {tuple(tensor.shape)}; it must be {dtype} of shape "
            f"{shape}, contiguous"
        )
