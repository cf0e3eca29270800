"""The exchanges that are compiled: what those through shared memory and through sockets share."""

from collections.abc import Sequence

from torch import Tensor

from moebius import _cpu
from moebius.errors import PeerError
from moebius.parallel.exchange import CheckedExchange, Epoch, ExchangeSpec, Traffic


class NativeExchange(CheckedExchange):
    """A rank's part, which its `_native` does."""

    def __init__(self, spec: ExchangeSpec, rank: int, epoch: Epoch, timeout: float) -> None:
        super().__init__(spec, rank, epoch, timeout)
        # Set by who derives from this; None again when it has been closed, with what it holds.
        self._native: _cpu.SharedExchange | _cpu.SocketExchange | None = None
        self._traffic_at_close = Traffic()

    @property
    def traffic(self) -> Traffic:
        native = self._native
        if native is None:
            return self._traffic_at_close
        found = native.traffic
        return Traffic(found.calls, found.bytes_out, found.bytes_in, found.seconds_waited)

    def close(self) -> None:
        super().close()
        if self._native is not None:
            self._native.give_up([self.rank])
            self._traffic_at_close = self.traffic
            self._native = None

    def give_up(self, ranks: Sequence[int]) -> None:
        check_ranks(ranks, self.spec)
        native = self._native
        if native is not None:
            native.give_up(ranks)

    def _agree(self, values: Sequence[int]) -> list[tuple[int, ...]]:
        native = self._open()
        try:
            return [tuple(each) for each in native.agree(values)]
        except _cpu.PeersLost as lost:
            raise self._peer_error(lost) from None

    def _dispatch(
        self, x_TD: Tensor, ids_TK: Tensor, owners_CE: Tensor, rows_RD: Tensor, ids_RK: Tensor
    ) -> int:
        native = self._open()
        splits, experts = owners_CE.shape
        try:
            return native.dispatch(
                x_TD.data_ptr(),
                ids_TK.data_ptr(),
                x_TD.shape[0],
                owners_CE.data_ptr(),
                splits,
                experts,
                rows_RD.data_ptr(),
                ids_RK.data_ptr(),
            )
        except _cpu.PeersLost as lost:
            raise self._peer_error(lost) from None

    def _combine(self, outputs_RKD: Tensor, back_TKD: Tensor) -> None:
        native = self._open()
        try:
            native.combine(outputs_RKD.data_ptr(), back_TKD.data_ptr())
        except _cpu.PeersLost as lost:
            raise self._peer_error(lost) from None

    def _open(self) -> _cpu.SharedExchange | _cpu.SocketExchange:
        """Whoever calls it keeps it, and what it holds, until the call has returned."""
        native = self._native
        if native is None:
            raise PeerError(f"{self.epoch}: rank {self.rank} has left it", ranks=(self.rank,))
        return native

    def _peer_error(self, lost: _cpu.PeersLost) -> PeerError:
        """What is known of ranks that this one cannot go on with, in words."""
        ranks, fault = lost.args
        named = ", ".join(str(rank) for rank in ranks)
        some = f"rank {named}" if len(ranks) == 1 else f"ranks {named}"
        if fault == "out of step":
            text = f"{some} did something else than rank {self.rank} at the same point of a step"
        elif fault == "left":
            text = f"the connection to {some} has ended"
        elif self.rank in ranks:
            text = f"the others have given up {some}, of which this is one"
        else:
            text = f"{some} did not come within {self.timeout:g} s, ended or left"
        return PeerError(f"{self.epoch}: {text}", ranks=tuple(ranks))


def check_ranks(ranks: Sequence[int], spec: ExchangeSpec) -> None:
    for rank in ranks:
        if not 0 <= rank < spec.size:
            raise ValueError(f"rank {rank} of {spec.size}")
