"""What nobody foresaw, while an engine serves: logged once under an id, and what the client is told
of it."""

import logging
import secrets
from collections.abc import Callable
from contextlib import suppress

from moebius.errors import EngineError, frames

log = logging.getLogger(__name__)


def failure(what: str, error: Exception) -> EngineError:
    """Log what happened under an error id; the error that a client gets names that and nothing of
    the cause."""
    error_id = secrets.token_hex(6)
    say(log.error, "error id %s: %s failed: %s", error_id, what, frames(error))
    told = EngineError(
        f"the engine failed on this request (error id {error_id})", error_id=error_id
    )
    told.__cause__ = error
    return told


def say(write: Callable[..., None], message: str, *args: object) -> None:
    """Log on the engine's thread, which a handler that raises must not end."""
    with suppress(Exception):
        write(message, *args)
