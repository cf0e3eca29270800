"""/openapi.json: the routes and their bodies, as the pydantic models have them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

import moebius
from moebius.server.fields import HARMLESS
from moebius.server.messages_bodies import CountTokensBody, MessagesBody
from moebius.server.ollama_bodies import OllamaChat, OllamaGenerate, OllamaShow
from moebius.server.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerationRequest,
    TokenizeRequest,
)
from moebius.server.responses_bodies import ResponsesBody

Json = dict[str, Any]

_TEXT: Json = {"type": "string"}
_IDS: Json = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_PROMPT: Json = {
    "description": "A text, token ids, or a list of either.",
    "anyOf": [
        _TEXT,
        {"type": "array", "items": _TEXT, "minItems": 1},
        _IDS,
        {"type": "array", "items": _IDS, "minItems": 1},
    ],
}
_PART: Json = {
    "type": "object",
    "required": ["type", "text"],
    "properties": {"type": {"const": "text"}, "text": _TEXT},
}
_CONTENT: Json = {"anyOf": [_TEXT, {"type": "null"}, {"type": "array", "items": _PART}]}
_MESSAGES: Json = {
    "description": "A conversation, oldest message first.",
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "required": ["role"],
        "properties": {
            "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
            "content": _CONTENT,
        },
    },
}
_STOP: Json = {"anyOf": [_TEXT, {"type": "array", "items": _TEXT}]}
# What the models take apart by themselves, and pydantic cannot describe.
_SHAPES: Mapping[str, Json] = {"prompt": _PROMPT, "messages": _MESSAGES, "stop": _STOP}


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one route.

    path      as in the router, its parameters in braces
    body      what it reads, if anything
    answers   the content type of what it answers
    streams   whether it answers with server-sent events where it is asked to
    open      it needs no API key
    """

    method: str
    path: str
    summary: str
    body: type[BaseModel] | None = None
    answers: str = "application/json"
    streams: bool = False
    open: bool = False

    @property
    def name(self) -> str:
        parts = [part.strip("{}") for part in self.path.split("/") if part]
        return "_".join([self.method, *parts])


OPERATIONS = (
    Operation("post", "/v1/chat/completions", "Answer a chat", ChatRequest, streams=True),
    Operation("post", "/v1/completions", "Complete a text", CompletionRequest, streams=True),
    Operation(
        "post", "/v1/messages", "Answer a chat, as Anthropic does", MessagesBody, streams=True
    ),
    Operation("post", "/v1/messages/count_tokens", "Count a prompt's tokens", CountTokensBody),
    Operation("post", "/v1/responses", "Answer, as a response", ResponsesBody, streams=True),
    Operation("post", "/v1/responses/input_tokens", "Count a prompt's tokens", ResponsesBody),
    Operation("post", "/tokenize", "The token ids of a text or a chat", TokenizeRequest),
    Operation("post", "/detokenize", "The text of token ids", DetokenizeRequest),
    Operation("get", "/v1/models", "The models that are served"),
    Operation("get", "/v1/models/{id}", "One model"),
    Operation("get", "/version", "The server's version"),
    Operation("get", "/health", "Whether work is taken and done"),
    Operation("get", "/health/ready", "Whether work is taken and done", open=True),
    Operation("get", "/health/live", "Whether the server answers at all", open=True),
    Operation("get", "/ping", "As /health"),
    Operation("get", "/metrics", "Prometheus metrics", answers="text/plain"),
    Operation("get", "/v1/moe/stats", "What the routers did of late"),
    Operation("get", "/v1/live", "The live page's figures", answers="text/event-stream"),
    Operation("get", "/", "The live page", answers="text/html", open=True),
    Operation("get", "/api/version", "Ollama's version"),
    Operation("get", "/api/tags", "The models, as Ollama lists them"),
    Operation("post", "/api/show", "One model, as Ollama shows it", OllamaShow),
    Operation("post", "/api/chat", "Answer a chat, as Ollama does", OllamaChat),
    Operation("post", "/api/generate", "Answer a prompt, as Ollama does", OllamaGenerate),
    Operation("get", "/openapi.json", "This description", open=True),
    Operation("get", "/docs", "This description, to be read", answers="text/html", open=True),
)

_ERROR: Json = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": _TEXT,
                "type": _TEXT,
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def document(operations: Iterable[Operation] = OPERATIONS) -> Json:
    """The description in OpenAPI 3.1."""
    schemas: Json = {"Error": _ERROR}
    paths: Json = {}
    for operation in operations:
        if operation.body is not None:
            schemas |= _schemas(operation.body)
        paths.setdefault(operation.path, {})[operation.method] = _described(operation)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Moebius",
            "version": moebius.__version__,
            "description": "OpenAI's API, and what other servers' clients know beside it.",
        },
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _described(operation: Operation) -> Json:
    content: Json = {operation.answers: {}}
    if operation.streams:
        content["text/event-stream"] = {}
    error = {
        "description": "What is wrong, and what would be right",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    }
    found: Json = {
        "operationId": operation.name,
        "summary": operation.summary,
        "responses": {
            "200": {"description": "The answer", "content": content},
            "4XX": error,
            "5XX": error,
        },
    }
    if "{id}" in operation.path:
        parameter = {"name": "id", "in": "path", "required": True, "schema": _TEXT}
        found["parameters"] = [parameter]
    if operation.body is not None:
        reference = {"$ref": f"#/components/schemas/{operation.body.__name__}"}
        body = {"required": True, "content": {"application/json": {"schema": reference}}}
        found["requestBody"] = body
    if operation.open:
        found["security"] = []
    return found


def _schemas(model: type[BaseModel]) -> Json:
    """The model's schema and those that it refers to, by name."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    others: Json = schema.pop("$defs", {})
    fields: Json = schema["properties"]
    if issubclass(model, GenerationRequest | TokenizeRequest):
        fields |= {name: _SHAPES[name] for name in fields.keys() & _SHAPES.keys()}
    if issubclass(model, GenerationRequest):
        ignored: Json = {"description": "Accepted, and without effect."}
        fields |= {name: ignored for name in sorted(HARMLESS)}
    required = schema.get("required", ())
    for name in fields.keys() - set(required):
        fields[name] = _or_null(fields[name])
    for each in (schema, *others.values()):
        each.pop("description", None)  # a docstring, which is for readers of the source
        each["properties"] = {
            name: {key: value for key, value in field.items() if key != "title"}
            for name, field in each["properties"].items()
        }
    return {model.__name__: schema, **others}


def _or_null(schema: Json) -> Json:
    """Null counts as not given, wherever a field need not be given."""
    kind = schema.get("type")
    options = schema.get("anyOf", [])
    if isinstance(kind, str) and "enum" not in schema:
        return {**schema, "type": [kind, "null"]}
    if options and {"type": "null"} not in options:
        return {**schema, "anyOf": [*options, {"type": "null"}]}
    if "$ref" in schema or "enum" in schema:
        return {"anyOf": [schema, {"type": "null"}]}
    return schema
