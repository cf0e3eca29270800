"""Anthropic's conversations as OpenAI's: a system text, and messages whose content is blocks.

See https://docs.anthropic.com/en/api/messages. Keys and blocks that mean nothing here are left out,
for clients add their own; what carries something that this server cannot read is refused by name.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moebius.errors import RequestError

Json = dict[str, Any]

# Claude Code begins its system text with this line, and what is in it changes with every request:
# with it, no turn would find the one before in the prefix cache.
_BILLING = "x-anthropic-billing-header:"
# Blocks of an assistant that only Anthropic's own server can read.
_OF_THEIR_SERVER = ("redacted_thinking", "server_tool_use", "fallback", "compaction")


def _wrong(at: str, message: str) -> RequestError:
    return RequestError(f"{at}: {message}", param=at)


def chat_messages(system: object, messages: Sequence[Mapping[str, Any]]) -> list[Json]:
    """The same conversation in OpenAI's form, each turn in its place. RequestError names what is
    wrong."""
    found: list[Json] = []
    instructions = _system_text(system, "system")
    if instructions:
        found.append({"role": "system", "content": instructions})
    for i, message in enumerate(messages):
        found += _turns(message, f"messages[{i}]")
    return found


def _turns(message: Mapping[str, Any], at: str) -> Iterator[Json]:
    role = message.get("role")
    content = message.get("content")
    match role:
        case "system":
            text = _system_text(content, f"{at}.content")
            if text:
                yield {"role": "system", "content": text}
        case "user":
            yield from _of_user(_blocks(content, f"{at}.content"), f"{at}.content")
        case "assistant":
            yield _of_assistant(_blocks(content, f"{at}.content"), f"{at}.content")
        case _:
            wanted = "it must be user, assistant or system"
            raise _wrong(f"{at}.role", f"role is {str(role)[:100]!r}; {wanted}")


def _blocks(content: object, at: str) -> list[Mapping[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list) or not all(isinstance(block, Mapping) for block in content):
        raise _wrong(at, "it must be a string or a list of blocks")
    return content


def _system_text(system: object, at: str) -> str:
    if system is None:
        return ""
    blocks = enumerate(_blocks(system, at))
    texts = (_without_billing(_text(block, f"{at}[{i}]")) for i, block in blocks)
    return "\n".join(text for text in texts if text)


def _without_billing(text: str) -> str:
    if not text.startswith(_BILLING):
        return text
    return text.partition("\n")[2]


def _text(block: Mapping[str, Any], at: str, key: str = "text") -> str:
    """Of a block of text, or a document that is one."""
    kind = block.get("type")
    if kind == "document":
        return _document(block, at)
    text = block.get(key)
    if kind not in ("text", "thinking"):
        raise _wrong(at, f"a block of type {str(kind)[:100]!r} is not supported; only text is")
    if not isinstance(text, str):
        raise _wrong(at, f"a {kind} block needs a string under `{key}`")
    return text


def _document(block: Mapping[str, Any], at: str) -> str:
    source = block.get("source")
    data = source.get("data") if isinstance(source, Mapping) else None
    if not isinstance(source, Mapping) or source.get("type") != "text" or not isinstance(data, str):
        raise _wrong(at, "of documents only those whose source is plain text are supported")
    return data


def _of_user(blocks: Sequence[Mapping[str, Any]], at: str) -> Iterator[Json]:
    """Results of tools stand before what the user says beside them."""
    texts: list[Json] = []
    results: list[Json] = []
    for i, block in enumerate(blocks):
        if block.get("type") == "tool_result":
            results.append(_result(block, f"{at}[{i}]"))
        else:
            texts.append({"type": "text", "text": _text(block, f"{at}[{i}]")})
    if not texts and not results:
        raise _wrong(at, "it is empty")
    yield from results
    if texts:
        yield {"role": "user", "content": texts}


def _result(block: Mapping[str, Any], at: str) -> Json:
    id = block.get("tool_use_id")
    if not isinstance(id, str):
        raise _wrong(f"{at}.tool_use_id", "it must be a string")
    content = block.get("content")
    if content is None:
        content = ""
    inner = enumerate(_blocks(content, f"{at}.content"))
    texts = [_result_text(each, f"{at}.content[{i}]") for i, each in inner]
    return {"role": "tool", "tool_call_id": id, "content": "\n".join(texts)}


def _result_text(block: Mapping[str, Any], at: str) -> str:
    if block.get("type") == "tool_reference":
        return str(block.get("tool_name", ""))
    return _text(block, at)


def _of_assistant(blocks: Sequence[Mapping[str, Any]], at: str) -> Json:
    """Pieces of one text were split by what stood between them."""
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[Json] = []
    for i, block in enumerate(blocks):
        kind = block.get("type")
        where = f"{at}[{i}]"
        if kind == "thinking":
            thoughts.append(_text(block, where, "thinking"))
        elif kind == "tool_use":
            calls.append(_call(block, where))
        elif kind not in _OF_THEIR_SERVER and not str(kind).endswith("_tool_result"):
            texts.append(_text(block, where))
    found: Json = {"role": "assistant", "content": "".join(texts)}
    if calls:
        found |= {"content": "".join(texts) or None, "tool_calls": calls}
    if any(thoughts):
        found["reasoning_content"] = "".join(thoughts)
    return found


def _call(block: Mapping[str, Any], at: str) -> Json:
    id = block.get("id")
    name = block.get("name")
    given = block.get("input")
    if not isinstance(id, str) or not isinstance(name, str) or not name:
        raise _wrong(at, "a tool_use block needs its `id` and `name`, strings")
    if not isinstance(given, Mapping | None):
        raise _wrong(f"{at}.input", "it must be an object")
    return {"id": id, "type": "function", "function": {"name": name, "arguments": given or {}}}
