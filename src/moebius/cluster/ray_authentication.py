"""Whether a Ray cluster lets in anybody who reaches it.

Who is let in may run any code on all of its nodes. What this process shows of itself says nothing:
a cluster that wants no token takes any. So it is asked something without one.
"""

import os

from moebius.errors import ConfigError

_ANSWER_SECONDS = 10.0
# What every release of Ray since 2.0 answers, with a few bytes.
_QUESTION = "/ray.rpc.NodeInfoGcsService/CheckAlive"
_HOW = (
    "start its nodes with RAY_AUTH_MODE=token and one RAY_AUTH_TOKEN (Ray 2.52 or later), or say "
    "--ray-allow-unauthenticated where nobody else reaches that network"
)


def check_authenticated(address: str, allowed: bool) -> None:
    """ConfigError where the cluster at HOST:PORT lets in anybody, or where that cannot be told,
    unless it is allowed to."""
    if allowed:
        return
    answer = answer_without_token(address)
    if answer == "UNAUTHENTICATED":
        return
    if answer == "UNAVAILABLE" and os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        return  # it talks to who shows a certificate
    if answer == "OK":
        raise ConfigError(
            f"the Ray cluster at {address} has no authentication: whoever reaches it can run any "
            f"code on its nodes; {_HOW}"
        )
    raise ConfigError(
        f"whether the Ray cluster at {address} has authentication cannot be told (it answers "
        f"{answer}); {_HOW}"
    )


def answer_without_token(address: str) -> str:
    """gRPC's name for how a cluster answers who shows neither token nor certificate."""
    import grpc

    with grpc.insecure_channel(address) as channel:
        try:
            channel.unary_unary(_QUESTION)(b"", timeout=_ANSWER_SECONDS)
        except grpc.RpcError as error:
            return str(error.code().name)
    return "OK"
