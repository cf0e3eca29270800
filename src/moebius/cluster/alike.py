"""Whether the hosts of a cluster serve one and the same thing."""

from collections.abc import Sequence
from dataclasses import fields

from moebius.engine.client import EngineInfo
from moebius.engine.cluster import HostHello
from moebius.engine.config import EngineConfig
from moebius.errors import ConfigError

OF_A_HOST = ("threads", "trace", "kv_cache_memory_bytes")
"""Options that each host may have for itself."""


def check_alike(own: HostHello, other: HostHello) -> None:
    """ConfigError where a host cannot be one of the front's, naming both and what differs."""
    here = own.title
    there = other.title
    if other.release != own.release:
        raise ConfigError(f"{there} has Moebius {other.release}, and {here} has {own.release}")
    if other.nodes != own.nodes:
        raise ConfigError(f"{there} was given --nnodes {other.nodes}, and {here} {own.nodes}")
    if not 1 <= other.node < own.nodes:
        raise ConfigError(
            f"{other.name} was given --node-rank {other.node}; of {own.nodes} nodes, the others "
            f"than the front's are 1 to {own.nodes - 1}"
        )
    if other.weights != own.weights:
        raise ConfigError(
            f"{there} has another model in {other.directory} than {here} in {own.directory}: "
            f"its files are {other.weights}, not {own.weights}"
        )
    if other.vocabulary != own.vocabulary:
        raise ConfigError(
            f"{there} has another tokenizer in {other.tokenizer or other.directory} than {here} in "
            f"{own.tokenizer or own.directory}: it is {other.vocabulary}, not {own.vocabulary}; "
            "give both the same --tokenizer, or none, and the same tokenizer.json"
        )
    for field in fields(EngineConfig):
        mine = getattr(own.config, field.name)
        its = getattr(other.config, field.name)
        if mine != its and field.name not in OF_A_HOST:
            option = "--" + field.name.replace("_", "-")
            raise ConfigError(f"{there} was given {option} {its}, and {here} {mine}")


def common_isa(hosts: Sequence[HostHello], *, exact: bool) -> str:
    """The highest instruction set whose kernels all hosts have; bits depend on it.

    exact: ConfigError where one has a higher one. ConfigError where they have none in common, or
    where one has no compiled kernels, with which rows are exchanged.
    """
    without = [host.title for host in hosts if host.isas == ("reference",)]
    if without:
        raise ConfigError(
            f"ranks need the compiled kernels, which the installation of {', '.join(without)} "
            "lacks: install it again with a C++ compiler at hand"
        )
    highest = {host.isas[-1] for host in hosts}
    told = ", ".join(f"{host.title} {host.isas[-1]}" for host in hosts)
    if exact and len(highest) > 1:
        raise ConfigError(f"--isa is exact, and hosts differ in their highest: {told}")
    common = [isa for isa in hosts[0].isas if all(isa in host.isas for host in hosts)]
    if not common:
        raise ConfigError(f"hosts have no kernels in common: {told}")
    return common[-1]


def check_engines_alike(first: EngineInfo, other: EngineInfo, name: str) -> None:
    """ConfigError where a rank that was loaded cannot serve what the first does."""
    if other.fingerprint != first.fingerprint:
        raise ConfigError(
            f"{name} computes {other.fingerprint}, and others {first.fingerprint}: weights, "
            "kernels and dtype must be the same at all ranks"
        )
    if other.limits != first.limits or other.block_size != first.block_size:
        raise ConfigError(
            f"{name} has room for {other.limits.max_model_len} tokens a request, and others for "
            f"{first.limits.max_model_len}; give the same --max-model-len and enough memory"
        )
