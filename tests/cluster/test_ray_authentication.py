"""A Ray cluster that lets in anybody is refused; what it is asked goes over gRPC for real."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

from moebius.cluster import ray_authentication
from moebius.cluster.ray_authentication import answer_without_token, check_authenticated
from moebius.errors import ConfigError

grpc = pytest.importorskip("grpc")
ADDRESS = "10.0.0.1:6379"


@contextmanager
def cluster(token: str | None) -> Iterator[str]:
    """What Ray's GCS is to who asks it; its address."""

    def answer(request: bytes, context: Any) -> bytes:
        shown = dict(context.invocation_metadata()).get("authorization")
        if token is not None and shown != f"Bearer {token}":
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "no token")
        return b""

    handlers = {"CheckAlive": grpc.unary_unary_rpc_method_handler(answer)}
    server = grpc.server(ThreadPoolExecutor(1))
    name = "ray.rpc.NodeInfoGcsService"
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


def test_who_wants_a_token_is_told_from_who_does_not() -> None:
    with cluster("secret") as address:
        assert answer_without_token(address) == "UNAUTHENTICATED"
        check_authenticated(address, allowed=False)
    with cluster(None) as address:
        assert answer_without_token(address) == "OK"
        with pytest.raises(ConfigError) as refused:
            check_authenticated(address, allowed=False)
        check_authenticated(address, allowed=True)
    assert f"the Ray cluster at {address} has no authentication" in str(refused.value)
    assert "RAY_AUTH_MODE=token" in str(refused.value)
    assert "--ray-allow-unauthenticated" in str(refused.value)


@pytest.mark.parametrize("answer", ["UNIMPLEMENTED", "UNAVAILABLE", "DEADLINE_EXCEEDED"])
def test_what_cannot_be_told_is_refused(answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_authentication, "answer_without_token", lambda address: answer)
    monkeypatch.delenv("RAY_USE_TLS", raising=False)
    with pytest.raises(ConfigError, match=f"cannot be told .it answers {answer}"):
        check_authenticated(ADDRESS, allowed=False)


def test_certificates_are_authentication_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray talks to the cluster by TLS, which asks for one of each side; others hear nothing."""
    monkeypatch.setenv("RAY_USE_TLS", "1")
    monkeypatch.setattr(ray_authentication, "answer_without_token", lambda address: "UNAVAILABLE")
    check_authenticated(ADDRESS, allowed=False)
    monkeypatch.setattr(ray_authentication, "answer_without_token", lambda address: "OK")
    with pytest.raises(ConfigError, match="no authentication"):
        check_authenticated(ADDRESS, allowed=False)
