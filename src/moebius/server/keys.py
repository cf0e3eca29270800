"""Who may call: the API keys of options and of a key file, and what each of them may do."""

import hashlib
import hmac
import logging
import os
import re
import stat
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from moebius.errors import ConfigError
from moebius.request.share import MAX_WEIGHT, MIN_WEIGHT, Share
from moebius.server.quotas import UNLIMITED, Limits, Quota
from moebius.server.settings import ServerSettings, check_key

log = logging.getLogger(__name__)

Door = Literal["api", "metrics"]
"""What a key may open: every route but /metrics, or that one."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LIMITS = ("max_requests", "max_queued_tokens", "requests_per_minute")
_FIELDS = ("key", "sha256", "weight", *_LIMITS, "priority", "opens")
_MOST_KEYS = 10_000
_FILE_BYTES = 8 * 2**20


@dataclass(frozen=True, slots=True, eq=False)
class ApiKey:
    """A key, and what whoever shows it may do.

    name       what the log calls it, and whose requests take turns with others'; "": it has no
               name, and its requests' owner is not told from others
    digest     SHA-256 of the key; b"": none is needed
    opens      the doors that it opens
    priority   whether its requests may bring a priority
    """

    name: str = ""
    digest: bytes = b""
    weight: float = 1.0
    limits: Limits = UNLIMITED
    priority: bool = True
    opens: frozenset[Door] = frozenset(("api", "metrics"))

    @property
    def share(self) -> Share:
        return Share(self.name, self.weight)

    @property
    def tenant(self) -> bytes:
        """What keeps the prefix cache of its requests apart from others'; b"" without a key."""
        if not self.digest:
            return b""
        return hashlib.blake2b(self.digest, digest_size=32, person=b"moebius-api-key").digest()


@dataclass(frozen=True, slots=True, eq=False)
class Caller:
    """Who makes a request: the key that was shown, and what its requests take at this moment."""

    key: ApiKey
    quota: Quota


ANYBODY = ApiKey()
"""Of a server that needs no key."""
OUTSIDER = Caller(ANYBODY, Quota())
"""Who probes a server that needs one, and shows none."""


class KeyRing:
    """The keys that a server knows. They can be read again while it serves.

    A key keeps what it has used of its limits when the file is read again, by its name.
    """

    def __init__(self, keys: Iterable[str] = (), file: Path | None = None) -> None:
        """keys: as they are; each may do everything. file: where more are. Raises ConfigError."""
        given = tuple(keys)
        several = len(given) > 1 or file is not None
        self._given = tuple(
            ApiKey(name=f"key-{number}" if several else "", digest=digest_of(key.encode()))
            for number, key in enumerate(given, 1)
        )
        self._file = file
        self._quotas: dict[str, Quota] = {}
        self._open = Caller(ANYBODY, Quota())
        self._keys = self._read()

    @classmethod
    def of(cls, settings: ServerSettings) -> Self:
        """Raises ConfigError."""
        return cls(settings.api_keys, settings.api_keys_file)

    def __len__(self) -> int:
        return len(self._keys)

    def reload(self) -> None:
        """Read the file again. ConfigError where it is wrong: then all stays as it was."""
        self._keys = self._read()
        names = {key.name for key in self._keys}
        self._quotas = {name: each for name, each in self._quotas.items() if name in names}

    def anybody(self) -> Caller | None:
        """Who calls a server that has no keys; None where a key is needed."""
        return None if self._keys else self._open

    def find(self, shown: bytes) -> Caller | None:
        """Whose key this is. Every key is compared, whichever it is, so that the time that this
        takes says nothing."""
        digest = digest_of(shown)
        matches = [key for key in self._keys if hmac.compare_digest(digest, key.digest)]
        if not matches:
            return None
        (key,) = matches
        return Caller(key, self._quotas.setdefault(key.name, Quota()))

    def _read(self) -> tuple[ApiKey, ...]:
        keys = self._given if self._file is None else (*self._given, *read_keys(self._file))
        by_digest: dict[bytes, ApiKey] = {}
        for key in keys:
            other = by_digest.setdefault(key.digest, key)
            if other is not key:
                raise ConfigError(f"API keys {other.name!r} and {key.name!r} are one key")
        if len({key.name for key in keys}) < len(keys):
            raise ConfigError(
                "a name in the key file is one that --api-key's have: key-1, key-2, and so on"
            )
        return keys


def digest_of(key: bytes) -> bytes:
    """What a key file may hold in a key's place."""
    return hashlib.sha256(key).digest()


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """The keys of a file. ConfigError names the file, the key and what is wrong, and quotes no key.

    The file is TOML, a table for each key by its name.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_FILE_BYTES + 1)
            mode = os.fstat(file.fileno()).st_mode
    except OSError as error:
        raise ConfigError(f"key file {path}: {error.strerror}") from error
    if len(data) > _FILE_BYTES:
        raise ConfigError(f"key file {path} is larger than {_FILE_BYTES} bytes")
    if mode & stat.S_IROTH and os.name == "posix":
        log.warning("key file %s can be read by everybody; chmod 600 it", path)
    try:
        tables = tomllib.loads(data.decode())
    except (ValueError, RecursionError):
        # Not in the words of the error, which may quote the line with a key.
        raise ConfigError(
            f"key file {path} is no TOML; write [NAME] and, below, key = ..."
        ) from None
    if not 0 < len(tables) <= _MOST_KEYS:
        raise ConfigError(f"key file {path} has {len(tables)} keys; 1 to {_MOST_KEYS} are read")
    return tuple(
        _Entry(f"key file {path}: [{name:.64}]", name, table).key()
        for name, table in tables.items()
    )


@dataclass(frozen=True, slots=True)
class _Entry:
    """One key's table. `where` begins every message."""

    where: str
    name: str
    table: Any

    def key(self) -> ApiKey:
        if _NAME.fullmatch(self.name) is None:
            raise ConfigError(
                f"{self.where}: a key's name has 1 to 63 letters, digits, '_', '.' and '-'"
            )
        if not isinstance(self.table, Mapping):
            raise ConfigError(f"{self.where} is no table; write [NAME] and, below, key = ...")
        for field in self.table:
            if field not in _FIELDS:
                raise ConfigError(
                    f"{self.where} has an unknown {field[:64]!r}; known are {', '.join(_FIELDS)}"
                )
        return ApiKey(
            name=self.name,
            digest=self._digest(),
            weight=self._weight(),
            limits=Limits(**{name: self._count(name) for name in _LIMITS}),
            priority=self._priority(),
            opens=self._opens(),
        )

    def _digest(self) -> bytes:
        if ("key" in self.table) == ("sha256" in self.table):
            raise ConfigError(f"{self.where} needs either key or sha256")
        if "key" in self.table:
            key = self.table["key"]
            if not isinstance(key, str):
                raise ConfigError(f"{self.where}: key must be a text")
            try:
                check_key(key)
            except ConfigError as error:
                raise ConfigError(f"{self.where}: {error}") from None
            return digest_of(key.encode())
        digits = self.table["sha256"]
        if not isinstance(digits, str) or _SHA256.fullmatch(digits.lower()) is None:
            raise ConfigError(
                f"{self.where}: sha256 must be 64 hexadecimal digits, as "
                "`printf %s KEY | sha256sum` prints them"
            )
        return bytes.fromhex(digits)

    def _weight(self) -> float:
        weight = self.table.get("weight", 1.0)
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number or not MIN_WEIGHT <= weight <= MAX_WEIGHT:
            raise ConfigError(
                f"{self.where}: weight must be a number from {MIN_WEIGHT} to {MAX_WEIGHT:g}"
            )
        return float(weight)

    def _count(self, name: str) -> int | None:
        count = self.table.get(name)
        if count is None:
            return None
        if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count < 2**31:
            raise ConfigError(f"{self.where}: {name} must be an integer of 1 or more")
        return count

    def _priority(self) -> bool:
        allowed = self.table.get("priority", False)
        if not isinstance(allowed, bool):
            raise ConfigError(f"{self.where}: priority must be true or false")
        return allowed

    def _opens(self) -> frozenset[Door]:
        doors = self.table.get("opens", ["api"])
        if (
            not isinstance(doors, list)
            or not doors
            or any(d not in ("api", "metrics") for d in doors)
        ):
            raise ConfigError(f'{self.where}: opens must be a list of "api" and "metrics"')
        return frozenset(doors)
