"""How two processes that meet over TCP prove to each other that they hold one cluster's key.

    listener                                   who connects
    MAGIC, nonce (32 bytes)            →
                                       ←       MAGIC, nonce, proof of the connecting side
    proof of the listening side        →

A proof is the key's BLAKE2b of both nonces, for the one side or for the other: it says nothing to
who lacks the key, can't be used again, and is nobody's own sent back. The listener proves last, so
that a stranger hears nothing from it but random numbers. Both then know two more keys, for the tags
of the frames that go either way.
"""

import hmac
import secrets

from moebius.errors import ChannelError
from moebius.parallel.channel import Seal
from moebius.parallel.key import ClusterKey

MAGIC = b"moebius\x01"
"""What a connection begins with: the protocol and its version."""
_NONCE_BYTES = 32
_PROOF_BYTES = 32
HELLO_BYTES = len(MAGIC) + _NONCE_BYTES
ANSWER_BYTES = HELLO_BYTES + _PROOF_BYTES
CONFIRMATION_BYTES = _PROOF_BYTES


class Greeting:
    """The listener's side of one connection."""

    def __init__(self, key: ClusterKey, peer: str) -> None:
        self._key = key
        self._peer = peer
        self._nonce = secrets.token_bytes(_NONCE_BYTES)
        self.hello = MAGIC + self._nonce

    def check(self, answer: bytes) -> tuple[bytes, tuple[Seal, Seal]]:
        """The confirmation to send, and the seals of what is sent and received. ChannelError where
        the answer (ANSWER_BYTES) is not of a holder of the key."""
        nonces = self._nonce + _nonce(answer, self._peer)
        if not hmac.compare_digest(self._key.derive(b"connects", nonces), answer[HELLO_BYTES:]):
            raise ChannelError(f"{self._peer} holds another cluster key, or none")
        to_listener = Seal(self._key.derive(b"to listener", nonces))
        from_listener = Seal(self._key.derive(b"from listener", nonces))
        return self._key.derive(b"listens", nonces), (from_listener, to_listener)


class Introduction:
    """The connecting side."""

    def __init__(self, key: ClusterKey, peer: str, hello: bytes) -> None:
        """ChannelError where the hello (HELLO_BYTES) is none."""
        own = secrets.token_bytes(_NONCE_BYTES)
        self._key = key
        self._peer = peer
        self._nonces = _nonce(hello, peer) + own
        self.answer = MAGIC + own + key.derive(b"connects", self._nonces)

    def check(self, confirmation: bytes) -> tuple[Seal, Seal]:
        """The seals of what is sent and received. ChannelError where the confirmation
        (CONFIRMATION_BYTES) is not of a holder of the key."""
        if not hmac.compare_digest(self._key.derive(b"listens", self._nonces), confirmation):
            raise ChannelError(f"{self._peer} does not hold this cluster's key")
        to_listener = Seal(self._key.derive(b"to listener", self._nonces))
        from_listener = Seal(self._key.derive(b"from listener", self._nonces))
        return to_listener, from_listener


def check_magic(received: bytes | bytearray, peer: str) -> None:
    """ChannelError where what has been received so far is no beginning of a hello."""
    if received[: len(MAGIC)] != MAGIC[: len(received)]:
        raise ChannelError(f"{peer} is no Moebius process, or of another release")


def _nonce(hello: bytes, peer: str) -> bytes:
    check_magic(hello, peer)
    return hello[len(MAGIC) : HELLO_BYTES]
