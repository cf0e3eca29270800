"""Moebius: trains, inspects and serves Mixture-of-Experts language models.

The public names are below; what imports torch is imported when it is first asked for.
"""

from typing import TYPE_CHECKING, Any

from moebius.request.params import SamplingParams
from moebius.request.structured import StructuredOutput

if TYPE_CHECKING:
    from moebius.front.results import CompletionOutput, RequestOutput
    from moebius.llm import LLM

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "CompletionOutput",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutput",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from moebius.llm import LLM

        return LLM
    if name in ("CompletionOutput", "RequestOutput"):
        from moebius.front import results

        return getattr(results, name)
    raise AttributeError(f"module 'moebius' has no attribute {name!r}")
