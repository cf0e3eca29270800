"""Which modules a configuration speaks of: exact names, patterns and classes of modules."""

import re
from collections.abc import Iterable, Sequence
from fnmatch import translate

from moebius.models.quantization.patterns import Patterns

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
        self._patterns = Patterns(f"(?:{pattern}){_BOUNDARY}" for pattern in patterns)

    def __call__(self, module: str, kind: str) -> bool:
        if module.endswith(self._ends) if self._ends else False:
            return True
        at = len(module)
        while at > 0:
            if module[:at] in self._whole:
                return True
            at = module.rfind(".", 0, at)
        return self._patterns.match(module)


class Targets:
    """compressed-tensors' targets: a module's whole name, `re:` and a regular expression that
    matches its beginning, or the name of its class."""

    def __init__(self, targets: Iterable[str]) -> None:
        targets = tuple(targets)
        self._names = frozenset(targets)
        self._patterns = Patterns(each[3:] for each in targets if each.startswith("re:"))

    def named(self, module: str, kind: str) -> bool:
        return module in self._names

    def like(self, module: str, kind: str) -> bool:
        return self._patterns.match(module)

    def classed(self, module: str, kind: str) -> bool:
        return kind in self._names

    def __call__(self, module: str, kind: str) -> bool:
        return any(way(module, kind) for way in (self.named, self.like, self.classed))


class Like:
    """A regular expression that matches the beginning of a module's name."""

    def __init__(self, pattern: str) -> None:
        self._patterns = Patterns([pattern])

    def __call__(self, module: str, kind: str) -> bool:
        return self._patterns.match(module)


class Wildcards:
    """Names with * in them, which stand for all modules below too."""

    def __init__(self, names: Iterable[str]) -> None:
        # Expressions of translate's own, which go back over nothing.
        self._patterns = [
            re.compile(translate(each)) for name in names for each in (name, f"{name}.*")
        ]

    def __call__(self, module: str, kind: str) -> bool:
        return any(pattern.match(module) for pattern in self._patterns)
