"""Ranks of one host with a device each meet at a file, in a process group of torch's that is one
epoch's alone: NCCL's between GPUs, and gloo's where tensors lie in the host's memory."""

import os
from datetime import timedelta
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist

from moebius.errors import ConfigError, PeerError
from moebius.parallel.collective import CollectiveExchange, Group
from moebius.parallel.exchange import Epoch, ExchangeSpec


def join_process_group(
    file: Path,
    spec: ExchangeSpec,
    rank: int,
    epoch: Epoch,
    *,
    timeout: float,
    device: torch.device,
) -> CollectiveExchange:
    """A rank's part in the group that meets at `file`, which is new and in a private directory.

    It waits for the others as long as any operation does. Raises PeerError where they don't come,
    ConfigError where this torch has no NCCL or rows arrive as others, and as CollectiveExchange
    does.
    """
    try:
        group = _group(file, rank, spec.size, timedelta(seconds=timeout), device)
    except RuntimeError as error:
        others = tuple(other for other in range(spec.size) if other != rank)
        why = str(error).partition("\n")[0]
        raise PeerError(f"{epoch}: its ranks did not meet ({why})", ranks=others) from None
    exchange = CollectiveExchange(group, spec, rank, epoch, timeout=timeout, device=device)
    _prove(exchange, device)
    return exchange


def _prove(exchange: CollectiveExchange, device: torch.device) -> None:
    """Rows that all ranks know go to them and come back: nobody else has tried this machine's
    devices and their links with this code."""
    spec = exchange.spec
    size = spec.size
    most = size * spec.tokens
    tokens = min(spec.tokens, 3)
    homes_PT = torch.arange(size * tokens, device=device).reshape(size, tokens)
    # Numbers that each dtype holds, in rows of no two equal ones.
    known_PTD = (homes_PT[..., None] + torch.arange(spec.hidden, device=device)) % 251
    x_PTD = known_PTD.to(spec.dtype)
    choices_K = torch.arange(spec.top_k, device=device)
    ids_PTK = (homes_PT[..., None] + choices_K) % size  # expert e is at rank e
    owners_1E = torch.arange(size, dtype=torch.int32, device=device)[None]
    rows_RD = torch.empty((most, spec.hidden), dtype=spec.dtype, device=device)
    ids_RK = torch.empty((most, spec.top_k), dtype=torch.int64, device=device)
    own_TD = x_PTD[exchange.rank].contiguous()
    received = exchange.dispatch(
        own_TD, ids_PTK[exchange.rank].contiguous(), owners_1E, rows_RD, ids_RK
    )
    outputs_RKD = rows_RD[:received, None].expand(-1, spec.top_k, -1).contiguous()
    back_TKD = torch.empty((tokens, spec.top_k, spec.hidden), dtype=spec.dtype, device=device)
    exchange.combine(outputs_RKD, back_TKD)
    here_PT = (ids_PTK == exchange.rank).any(2)
    arrived = torch.equal(rows_RD[:received], x_PTD[here_PT])
    if not (arrived and torch.equal(back_TKD, own_TD[:, None].expand_as(back_TKD))):
        raise ConfigError(
            f"rank {exchange.rank}: rows that were sent between {size} ranks on {device.type} came "
            "as others; use --ranks 1, or --device cpu"
        )


def _group(file: Path, rank: int, size: int, timeout: timedelta, device: torch.device) -> Group:
    store = dist.FileStore(str(file), size)  # type: ignore[attr-defined] # it is documented
    if device.type == "cpu":
        return cast("Group", dist.ProcessGroupGloo(store, rank, size, timeout))
    if not dist.is_nccl_available():
        raise ConfigError(
            f"ranks with a GPU each exchange rows by NCCL, which torch {torch.__version__} was "
            "built without; use --ranks 1, or --device cpu"
        )
    # Whoever reaches NCCL's sockets is believed: they are to be this host's alone.
    os.environ["NCCL_SOCKET_IFNAME"] = "lo"
    # Of a rank that is lost the exchange hears by its own clock, and the others go on. torch's own
    # watch would end this process.
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return cast("Group", dist.ProcessGroupNCCL(store, rank, size, options))
