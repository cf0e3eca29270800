"""How a request ends."""

import enum


class FinishReason(enum.Enum):
    """Why a sequence ended. The first two are OpenAI's; the others reach clients as errors."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    DEADLINE = "deadline"
    ERROR = "error"
