"""What goes wrong while an engine serves: what the log says of it, and what the client is told."""

import logging
import secrets
from collections.abc import Callable
from contextlib import suppress

from moebius.engine.client import StepOutput
from moebius.errors import EngineError, EngineLostError, MoebiusError, frames
from moebius.request.finish import FinishReason

log = logging.getLogger(__name__)


def failure(what: str, error: Exception) -> EngineError:
    """Log under an id what nobody foresaw; the client's error names that id, not the cause."""
    error_id = secrets.token_hex(6)
    say(log.error, "error id %s: %s failed: %s", error_id, what, frames(error))
    told = EngineError(
        f"the engine failed on this request (error id {error_id})", error_id=error_id
    )
    told.__cause__ = error
    return told


def told(what: str, error: Exception) -> MoebiusError:
    """What the client is told: what was raised on purpose, or else a failure."""
    return error if isinstance(error, MoebiusError) else failure(what, error)


def lost(cause: EngineError) -> EngineLostError:
    """What requests end with whose engine is gone because of `cause`."""
    return EngineLostError(str(cause), error_id=cause.error_id)


def failed(request_id: str, error: MoebiusError) -> StepOutput:
    """The last output of a request that ends with an error."""
    return StepOutput(request_id, finish_reason=FinishReason.ERROR, error=error)


def say(write: Callable[..., None], message: str, *args: object) -> None:
    """Log on the engine's thread, which a handler that raises must not end."""
    with suppress(Exception):
        write(message, *args)
