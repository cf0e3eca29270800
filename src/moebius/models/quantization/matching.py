"""Which modules a configuration speaks of: exact names, patterns and classes of modules."""

import re
from collections.abc import Iterable, Sequence
from fnmatch import translate

from moebius.errors import ConfigError

# Where a name is no pattern, a dot in it is a dot.
_SPECIAL = frozenset("\\^$*+?{}[]|()")
# Behind what a pattern matches a part of the name ends.
_BOUNDARY = r"(?:(?<=\.)|(?=\.|$))"


def everything(module: str, kind: str) -> bool:
    """All modules: those of plain numbers are told by their tensors."""
    return True


class Skipped:
    """`modules_to_not_convert`, as transformers reads it: a name matches from its beginning up to a
    dot or its end, as a regular expression too, or at its end."""

    def __init__(self, names: Sequence[str]) -> None:
        plain = [name for name in names if not _SPECIAL.intersection(name)]
        self._whole = frozenset(name.removesuffix(".") for name in plain)
        self._ends = tuple(names)
        patterns = [name for name in names if _SPECIAL.intersection(name)]
        self._patterns = [_compiled(f"(?:{pattern}){_BOUNDARY}") for pattern in patterns]

    def __call__(self, module: str, kind: str) -> bool:
        if module.endswith(self._ends) if self._ends else False:
            return True
        at = len(module)
        while at > 0:
            if module[:at] in self._whole:
                return True
            at = module.rfind(".", 0, at)
        return any(pattern.match(module) for pattern in self._patterns)


class Targets:
    """compressed-tensors' targets: a module's whole name, `re:` and a regular expression that
    matches its beginning, or the name of its class."""

    def __init__(self, targets: Iterable[str]) -> None:
        targets = tuple(targets)
        self._names = frozenset(targets)
        self._patterns = [_compiled(each[3:]) for each in targets if each.startswith("re:")]

    def named(self, module: str, kind: str) -> bool:
        return module in self._names

    def like(self, module: str, kind: str) -> bool:
        return any(pattern.match(module) for pattern in self._patterns)

    def classed(self, module: str, kind: str) -> bool:
        return kind in self._names

    def __call__(self, module: str, kind: str) -> bool:
        return any(way(module, kind) for way in (self.named, self.like, self.classed))


class Like:
    """A regular expression that matches the beginning of a module's name."""

    def __init__(self, pattern: str) -> None:
        self._pattern = _compiled(pattern)

    def __call__(self, module: str, kind: str) -> bool:
        return self._pattern.match(module) is not None


class Wildcards:
    """Names with * in them, which stand for all modules below too."""

    def __init__(self, names: Iterable[str]) -> None:
        each = [_compiled(translate(name)) for name in names]
        below = [_compiled(translate(f"{name}.*")) for name in names]
        self._patterns = each + below

    def __call__(self, module: str, kind: str) -> bool:
        return any(pattern.match(module) for pattern in self._patterns)


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as cause:
        raise ConfigError(
            f"config.json: quantization_config: {pattern!r} is no regular expression: {cause}"
        ) from None
