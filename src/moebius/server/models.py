"""The list of models, in one shape that OpenAI's, Anthropic's and Codex' clients read."""

import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

Json = dict[str, Any]


def card(name: str, first: str, created: int, max_model_len: int) -> Json:
    """One model, under one of its names; first: the name that answers carry."""
    return {
        "id": name,
        "object": "model",
        "owned_by": "moebius",
        "created": created,
        "max_model_len": max_model_len,
        "root": first,
        "parent": None,
        "permission": [_permission(name, created)],
        # Anthropic's names for the same.
        "type": "model",
        "display_name": name,
        "lifecycle": "active",
        "created_at": datetime.fromtimestamp(created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "max_input_tokens": max_model_len,
        "max_tokens": max_model_len,
    }


def listing(cards: Sequence[Json]) -> Json:
    """All of them, on one page. Codex wants a list `models` of a kind of its own, and logs an error
    where there is none."""
    return {
        "object": "list",
        "data": list(cards),
        "has_more": False,
        "first_id": cards[0]["id"],
        "last_id": cards[-1]["id"],
        "models": [],
    }


def _permission(name: str, created: int) -> Json:
    """What OpenAI's API once said of every model, and clients written for vLLM may still read."""
    allowed = {"sampling": True, "logprobs": True, "view": True}
    refused = {"create_engine": False, "search_indices": False, "fine_tuning": False}
    return {
        "id": "modelperm-" + hashlib.blake2b(name.encode(), digest_size=12).hexdigest(),
        "object": "model_permission",
        "created": created,
        **{f"allow_{what}": allows for what, allows in (allowed | refused).items()},
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
