"""What the log of a serving process looks like, the same for all of its processes."""

import logging

LEVELS = ("debug", "info", "warning", "error")


def to_stderr(level: str) -> None:
    """Log what is of this level or above, one of LEVELS."""
    logging.basicConfig(
        level=level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )


def level() -> str:
    """The one of LEVELS from which on this process logs."""
    found = logging.getLogger("moebius").getEffectiveLevel()
    known = [name for name in LEVELS if logging.getLevelNamesMapping()[name.upper()] >= found]
    return known[0] if known else LEVELS[-1]
