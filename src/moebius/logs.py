"""What the log of a serving process looks like, the same for all of its processes."""

import logging

LEVELS = ("debug", "info", "warning", "error")


def to_stderr(level: str) -> None:
    """Log what is of this level or above, one of LEVELS."""
    logging.basicConfig(
        level=level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
