"""What a client wants an answer's text to be, in all the fields that clients say it in."""

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field

from moebius.errors import RequestError
from moebius.request.structured import StructuredOutput
from moebius.server.fields import as_list, at_most, without_nulls

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_GUIDED = ("json", "regex", "choice", "grammar")
_OPTIONS = ("whitespace_pattern", "disable_any_whitespace")
_FORMATS = "text, json_object or json_schema"


class StructuredFields(BaseModel):
    """The fields of a body: OpenAI's, vLLM's of now and before, llama.cpp's."""

    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: Any = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None
    grammar: str | None = None
    json_schema: Any = None
    allowed_token_ids: Annotated[list[int], at_most("allowed_token_ids")] = Field(
        default_factory=list
    )
    bad_words: Annotated[list[str], at_most("bad_words"), BeforeValidator(as_list)] = Field(
        default_factory=list
    )

    @property
    def structured(self) -> StructuredOutput | None:
        """What the text is to be; None: any. RequestError where fields say it in no known way, or
        several say it."""
        found = {
            "response_format": _of_response_format(self.response_format),
            "structured_outputs": _of_structured_outputs(self.structured_outputs),
            **self._guided(),
            "grammar": _given("grammar", grammar=self.grammar),
            "json_schema": _given("json_schema", json=self.json_schema),
        }
        wanted = {name: each for name, each in found.items() if each is not None}
        if len(wanted) > 1:
            first, second, *_ = wanted
            raise RequestError(
                f"{first} and {second} both say what the text is to be; give one of them",
                param=second,
            )
        if not wanted and self.guided_whitespace_pattern is not None:
            raise RequestError(
                "guided_whitespace_pattern needs guided_json", param="guided_whitespace_pattern"
            )
        return next(iter(wanted.values()), None)

    def _guided(self) -> dict[str, StructuredOutput | None]:
        options = {"whitespace_pattern": self.guided_whitespace_pattern}
        return {
            f"guided_{kind}": _given(
                f"guided_{kind}", **{kind: getattr(self, f"guided_{kind}")}, **options
            )
            for kind in _GUIDED
        }


def _given(param: str, **fields: Any) -> StructuredOutput | None:
    """What one field says of one kind, the first of `fields`; None where it is not given."""
    kind, value = next(iter(fields.items()))
    if value is None:
        return None
    if kind == "choice":
        if not value:
            raise RequestError(f"{param} is empty", param=param)
        fields["choice"] = tuple(value)
    return StructuredOutput(**fields, param=param)


def _of_response_format(given: Mapping[str, Any] | None) -> StructuredOutput | None:
    """OpenAI's, and `schema` beside json_object, as llama.cpp and others have it."""
    if given is None:
        return None
    name = "response_format"
    given = without_nulls(given)
    match given.get("type"):
        case "text":
            _refuse_others(name, given, ("type",))
            return None
        case "json_object":
            _refuse_others(name, given, ("type", "schema"))
            return _of_schema(f"{name}.schema", given.get("schema"), strict=False)
        case "json_schema" if "json_schema" in given:
            _refuse_others(name, given, ("type", "json_schema"))
            return _of_json_schema(f"{name}.json_schema", given["json_schema"])
        case "json_schema":
            inner = {key: value for key, value in given.items() if key != "type"}
            return _of_json_schema(name, inner)
        case "structural_tag":
            raise _unsupported(f"{name}.type", "structural_tag")
        case other:
            raise RequestError(
                f"{name}.type is {str(other)[:100]!r}; it must be {_FORMATS}", param=f"{name}.type"
            )


def _of_json_schema(at: str, given: object) -> StructuredOutput:
    if not isinstance(given, Mapping):
        raise RequestError(f"{at} must be an object", param=at)
    fields: dict[str, Any] = without_nulls(dict(given))
    _refuse_others(at, fields, ("name", "description", "schema", "strict"))
    name = fields.get("name", "schema")
    if not isinstance(name, str) or _NAME.fullmatch(name) is None:
        raise RequestError(
            f"{at}.name must be 1 to 64 of the characters A-Z a-z 0-9 _ -", param=f"{at}.name"
        )
    strict = fields.get("strict", False)
    if not isinstance(strict, bool):
        raise RequestError(f"{at}.strict must be true or false", param=f"{at}.strict")
    return _of_schema(f"{at}.schema", fields.get("schema"), strict=strict)


def _of_schema(at: str, schema: object, *, strict: bool) -> StructuredOutput:
    """Any object where there is no schema."""
    if schema is None:
        return StructuredOutput(json_object=True, param=at.removesuffix(".schema"))
    if not isinstance(schema, dict):
        raise RequestError(f"{at} must be an object", param=at)
    return StructuredOutput(json=schema, strict=strict, param=at)


def _of_structured_outputs(given: Mapping[str, Any] | None) -> StructuredOutput | None:
    """vLLM's."""
    if given is None:
        return None
    name = "structured_outputs"
    fields = without_nulls(given)
    if "structural_tag" in fields:
        raise _unsupported(f"{name}.structural_tag", "structural_tag")
    if fields.pop("disable_additional_properties", False) is not False:
        raise _unsupported(f"{name}.disable_additional_properties", "this option")
    _refuse_others(name, fields, (*_GUIDED, "json_object", *_OPTIONS))
    if not isinstance(fields.get("json", {}), dict | str):
        raise RequestError(f"{name}.json must be an object or its text", param=f"{name}.json")
    if not isinstance(fields.get("choice", []), list):
        raise RequestError(f"{name}.choice must be a list of texts", param=f"{name}.choice")
    if fields.get("json_object") is False:
        raise RequestError(f"{name}.json_object must be true", param=f"{name}.json_object")
    return StructuredOutput(**fields, param=name)


def _refuse_others(at: str, given: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key in given:
        if key not in known:
            raise RequestError(
                f"{at}.{key[:200]}: there is no such field; it has {', '.join(known)}",
                param=f"{at}.{key[:200]}",
            )


def _unsupported(param: str, what: str) -> RequestError:
    return RequestError(
        f"{param}: {what} is not supported here; use json, regex, choice or grammar", param=param
    )
