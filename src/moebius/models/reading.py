"""Reading a config.json: what decides is what transformers' class for the model_type makes of it.

A key that its model reads is either computed here as well, or has to have the value that leaves the
model as it is; any other value is an error, for the model would not compute what it was trained
for. A key that its model does not read changes nothing. One that is absent has the default of its
configuration class, because checkpoints were saved without keys that equal it. Which is which
stands beside each family, in a table made from transformers' sources. Configurations of
transformers 4 and 5 are both read.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moebius.errors import ConfigError
from moebius.files import package_table, read_json

HARMLESS = frozenset(package_table("models/keys.toml")["harmless"])


@dataclass(frozen=True)
class Keys:
    """What the keys of one kind of object mean.

    read        each key that counts, with what its absence means
    never_null  keys for which null is no value; elsewhere it is one of its own, which None stands
                for
    aliases     other names of keys
    closed      no other key is known, and an unknown one may count
    """

    read: Mapping[str, Any]
    never_null: frozenset[str] = frozenset()
    aliases: Mapping[str, str] = field(default_factory=dict)
    closed: bool = False

    @classmethod
    def of_file(cls, path: Path) -> "Keys":
        """Those of a model_type that transformers knows, as tests/models/config_keys.py wrote
        them."""
        entry = read_json(path)
        return cls(entry["read"], frozenset(entry["never_null"]), entry["aliases"])


@dataclass
class ConfigReader:
    """The keys of one config.json, or of an object in it, remembering which were computed.

    `where` begins every error. `ignored` collects what changes nothing and is worth a line.
    """

    raw: Mapping[str, Any]
    keys: Keys
    where: str = "config.json: "
    computed: set[str] = field(default_factory=set)
    ignored: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        raw: dict[str, Any] = {}
        for key, value in self.raw.items():
            name = self.keys.aliases.get(key, key)
            same = raw.get(name) is None or value is None or raw[name] == value
            if not same:
                raise self.error(
                    f"{name} is {raw.get(name)!r} and, by its other name, {value!r}; keep one"
                )
            raw[name] = raw.get(name) if value is None else value
        self.raw = raw

    def error(self, message: str) -> ConfigError:
        """What is wrong with this object."""
        return ConfigError(self.where + message)

    def get(self, key: str) -> Any:
        """The key's value; where it is absent, what its absence means."""
        self.computed.add(key)
        meant = self.keys.read.get(key)
        if key not in self.raw:
            return meant
        value = self.raw[key]
        if value is None and key in self.keys.never_null:
            raise self.error(
                f"{key} is null; leave it out for its default of {meant!r}, or give a value"
            )
        return value

    def _checked(self, key: str, default: Any, kinds: tuple[type, ...], wanted: str) -> Any:
        value = self.get(key)
        value = default if value is None else value
        if value is None:
            how = "null" if key in self.raw else "missing"
            raise self.error(f"{key} is {how}; it must be {wanted}")
        good = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
        if not good:
            raise self.error(f"{key} is {value!r}; it must be {wanted}")
        return value

    def integer(self, key: str, default: int | None = None, low: int = 1) -> int:
        """`default` is what null means, or what absence does where the class leaves it open."""
        wanted = f"an integer of at least {low}"
        value: int = self._checked(key, default, (int,), wanted)
        if value < low:
            raise self.error(f"{key} is {value}; it must be {wanted}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._checked(key, default, (int, float), "a number")
        # An integer may be too long for any float.
        if not abs(value) <= sys.float_info.max:
            raise self.error(f"{key} is {value}; it must be a finite number")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        return None if self.get(key) is None else self.number(key)

    def word(self, key: str, known: Sequence[str]) -> str:
        value = self.get(key)
        if value not in known:
            raise self.error(f"{key} is {value!r}; supported are {', '.join(known)}")
        return str(value)

    def flag(self, key: str, default: bool = False) -> bool:
        return bool(self._checked(key, default, (bool,), "true or false"))

    def indices(self, key: str) -> tuple[int, ...]:
        wanted = "a list of layer numbers"
        value = self._checked(key, [], (list,), wanted)
        if not all(type(i) is int for i in value):
            raise self.error(f"{key} is {value!r}; it must be {wanted}")
        return tuple(value)

    @property
    def num_layers(self) -> int:
        return self.integer("num_hidden_layers")

    def finish(self) -> None:
        """Sort out the keys that were not computed. Raises ConfigError naming one that counts."""
        model = f" for model_type {self.raw['model_type']!r}" if "model_type" in self.raw else ""
        for key, value in self.raw.items():
            default = self.keys.read.get(key)
            if key in self.computed or key in HARMLESS or (value is None and default is None):
                continue
            counts = self.keys.closed or key in self.keys.read
            neutral = value in ([], {}) or value == default
            if counts and not neutral:
                raise self.error(
                    f"{key} = {value!r} is not supported{model}; the model would not compute what "
                    "it was trained for"
                )
            if not counts and not key.startswith("_"):
                self.ignored.append(key)
