"""The cluster's key, which every process of a cluster holds and nobody else."""

import hmac
import logging
import os
import re
import secrets
import stat
from hashlib import blake2b
from pathlib import Path
from typing import NoReturn, Self

from moebius.errors import ConfigError

log = logging.getLogger(__name__)

VARIABLE = "MOEBIUS_CLUSTER_KEY"
_BYTES = 32
_TEXT = re.compile(r"[0-9a-f]{64}")
_WANTED = "64 hexadecimal digits, as `moebius cluster key` prints them"


class ClusterKey:
    """32 secret bytes. They show in `text` alone: in no log, no repr, and no pickle."""

    __slots__ = ("_secret",)

    def __init__(self, secret: bytes) -> None:
        if len(secret) != _BYTES:
            raise ConfigError(f"a cluster key has {_BYTES} bytes, not {len(secret)}")
        self._secret = secret

    @classmethod
    def draw(cls) -> Self:
        """A new one, of the system's random numbers."""
        return cls(secrets.token_bytes(_BYTES))

    @classmethod
    def from_text(cls, text: str, source: str = "the text") -> Self:
        """The key that has this text form. ConfigError, which does not quote it, for another."""
        digits = text.strip().lower()
        if not _TEXT.fullmatch(digits):
            raise ConfigError(f"{source} is no cluster key; it must hold {_WANTED}")
        return cls(bytes.fromhex(digits))

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """The key in a file. ConfigError where there is none; a file for all to read is said."""
        try:
            text = path.read_text(encoding="ascii", errors="replace")
            mode = path.stat().st_mode
        except OSError as error:
            raise ConfigError(f"cluster key file {path}: {error.strerror}") from error
        if mode & stat.S_IROTH and os.name == "posix":
            log.warning("cluster key file %s can be read by everybody; chmod 600 it", path)
        return cls.from_text(text, f"cluster key file {path}")

    @classmethod
    def from_environment(cls) -> Self | None:
        """The key in the variable MOEBIUS_CLUSTER_KEY; None where that is not set."""
        text = os.environ.get("MOEBIUS_CLUSTER_KEY")
        return None if text is None else cls.from_text(text, VARIABLE)

    @property
    def text(self) -> str:
        """What a file or the variable holds of it."""
        return self._secret.hex()

    def derive(self, purpose: bytes, *parts: bytes) -> bytes:
        """32 bytes that only a holder of the key can make: its BLAKE2b of the parts.

        purpose, of at most 16 bytes, keeps different uses apart. Parts that could be cut elsewhere
        to the same whole must not both be possible: they have fixed lengths.
        """
        return blake2b(b"".join(parts), key=self._secret, person=purpose, digest_size=32).digest()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ClusterKey):
            return NotImplemented
        return hmac.compare_digest(self._secret, other._secret)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return "ClusterKey(...)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a cluster key goes to no pickle")
