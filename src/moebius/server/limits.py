"""What a server reads of one HTTP request at most; what may be asked of an engine is in LIMITS."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """Counts and bytes of one request.

    bodies_bytes  the bodies of all requests together that a server has in memory
    json_values   values in one body; json_parts of them may be strings (names included), lists and
                  objects, each of which costs the parser ten times what a number costs
    """

    prompts: int = 64
    messages: int = 4096
    documents: int = 4096
    body_bytes: int = 8 * 2**20
    bodies_bytes: int = 64 * 2**20
    header_bytes: int = 16 * 2**10
    json_depth: int = 64
    json_values: int = 2**20
    json_parts: int = 2**16


HTTP_LIMITS = HttpLimits()
