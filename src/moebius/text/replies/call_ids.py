"""Ids of tool calls, made so that the same request gets the same ones."""

from hashlib import blake2b

_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def call_id(key: str, index: int) -> str:
    """The id of a request's call: 24 letters and digits behind `call_`, as OpenAI's look."""
    return "call_" + short_id(key, index, 24)


def short_id(key: str, index: int, length: int) -> str:
    """So many letters and digits."""
    data = f"{index}:{key}".encode()
    number = int.from_bytes(blake2b(data, digest_size=32, person=b"moebius-call").digest(), "big")
    letters = []
    for _ in range(length):
        number, letter = divmod(number, len(_ALPHABET))
        letters.append(_ALPHABET[letter])
    return "".join(letters)
