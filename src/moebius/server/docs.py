"""/docs: /openapi.json as one page to be read, which loads nothing and runs nothing."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from moebius.server.fields import HARMLESS

Json = dict[str, Any]

_TEMPLATE = Path(__file__).parent / "docs.html.j2"
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


@dataclass(frozen=True, slots=True)
class _Field:
    """A field of a body, as the page shows it."""

    name: str
    type: str
    description: str | None
    required: bool
    default: object


def page(document: Json) -> str:
    """The page of an OpenAPI document with our shapes."""
    schemas: Json = document["components"]["schemas"]

    def fields_of(operation: Json) -> list[_Field]:
        if "requestBody" not in operation:
            return []
        body = operation["requestBody"]["content"]["application/json"]["schema"]
        schema: Json = schemas[_named(body)]
        return [
            _Field(
                name=name,
                type=_type(field, schemas),
                description=field.get("description"),
                required=name in schema.get("required", ()),
                default=field.get("default"),
            )
            for name, field in schema["properties"].items()
            if name not in HARMLESS
        ]

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(document, fields_of=fields_of, ignored=sorted(HARMLESS))


def _named(reference: Json) -> str:
    name: str = reference["$ref"].rpartition("/")[2]
    return name


def _type(field: Json, schemas: Json) -> str:
    """What a field holds, in a word or a few."""
    if "$ref" in field:
        inner = schemas[_named(field)]["properties"]
        return "object with " + ", ".join(inner)
    if "enum" in field:
        return " or ".join(f'"{value}"' for value in field["enum"])
    if "anyOf" in field:
        kinds = [_type(option, schemas) for option in field["anyOf"]]
        return " or ".join(kind for kind in dict.fromkeys(kinds) if kind != "null")
    kind = field.get("type", "any")
    if isinstance(kind, list):
        kind = " or ".join(each for each in kind if each != "null")
    items = field.get("items")
    return f"{kind} of {_type(items, schemas)}" if kind == "array" and items else str(kind)
