"""How a request ends."""

import enum


class FinishReason(enum.Enum):
    """Why a sequence ended. The first two are OpenAI's; the others reach clients as errors.

    COMPLETE is STOP without a token that says so: the grammar takes no more.
    """

    STOP = "stop"
    LENGTH = "length"
    COMPLETE = "complete"
    ABORT = "abort"
    DEADLINE = "deadline"
    ERROR = "error"
