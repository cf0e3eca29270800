"""Tool calls as each family writes them, whole and cut in every place."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest

from covering import each_value
from moebius.errors import ConfigError
from moebius.text import Tokenizer
from moebius.text.replies import FORMATS, CallArguments, fold
from moebius.text.replies.detect import KINDS
from text.family_templates import FAMILIES as TEMPLATES
from text.replies import calls, events, family, said

ROME = {"city": "Rome", "days": 3}


@dataclass(frozen=True)
class Family:
    """What a family's template says, and replies with one call, two, and one without arguments."""

    name: str
    says: str
    one: str
    two: str
    bare: str


def tool_calls(*each: str) -> str:
    return "<tool_call>\n" + "\n</tool_call>\n<tool_call>\n".join(each) + "\n</tool_call>"


def xml(city: str, days: str = "") -> str:
    more = f"<parameter=days>\n{days}\n</parameter>\n" if days else ""
    return f"<function=get_weather>\n<parameter=city>\n{city}\n</parameter>\n{more}</function>"


def glm(city: str, gap: str = "\n") -> str:
    pairs = (("city", city), ("days", "3"))
    written = gap.join(
        f"<arg_key>{key}</arg_key>{gap}<arg_value>{value}</arg_value>" for key, value in pairs
    )
    return f"<tool_call>get_weather{gap}{written}{gap}</tool_call>"


def invoke(city: str, bar: str = "", strings: tuple[str, str] = ("", "")) -> str:
    return (
        f'<{bar}invoke name="get_weather">\n'
        f'<{bar}parameter name="city"{strings[0]}>{city}</{bar}parameter>\n'
        f'<{bar}parameter name="days"{strings[1]}>3</{bar}parameter>\n</{bar}invoke>\n'
    )


def dsml(tag: str, *calls: str) -> str:
    return f"<｜DSML｜{tag}>\n{''.join(calls)}</｜DSML｜{tag}>"


def deepseek(*texts: str) -> str:
    inner = "\n".join(f"<｜tool▁call▁begin｜>{text}<｜tool▁call▁end｜>" for text in texts)
    return f"<｜tool▁calls▁begin｜>{inner}<｜tool▁calls▁end｜>"


def kimi(*texts: str) -> str:
    inner = "".join(f"<|tool_call_begin|>{text}<|tool_call_end|>" for text in texts)
    return f"<|tool_calls_section_begin|>{inner}<|tool_calls_section_end|>"


def v3(arguments: str, name: str = "get_weather") -> str:
    return f"function<｜tool▁sep｜>{name}\n```json\n{arguments}\n```"


ROME_JSON = '{"city": "Rome", "days": 3}'
OSLO_JSON = '{"city": "Oslo", "days": 3}'
STRINGS = (' string="true"', ' string="false"')
NO_CALL = '<｜DSML｜invoke name="now">\n</｜DSML｜invoke>\n'
DEEPSEEK = "<｜tool▁calls▁begin｜> <｜tool▁sep｜>"
FAMILIES = [
    Family("qwen-xml", "<function= <parameter= <tool_call>", tool_calls(xml("Rome", "3")),
           tool_calls(xml("Rome", "3"), xml("Oslo", "3")), tool_calls("<function=now>\n</function>")),
    Family("seed-xml", "<function= <parameter= <seed:tool_call>",
           f"<seed:tool_call>\n{xml('Rome', '3')}\n</seed:tool_call>",
           "\n".join(f"<seed:tool_call>\n{xml(c, '3')}\n</seed:tool_call>" for c in ("Rome", "Oslo")),
           "<seed:tool_call><function=now></function></seed:tool_call>"),
    Family("glm", "<arg_key> <arg_value>", glm("Rome"), glm("Rome") + "\n" + glm("Oslo", ""),
           "<tool_call>now\n</tool_call>"),
    Family("minimax", "<minimax:tool_call>",
           f"<minimax:tool_call>\n{invoke('Rome')}</minimax:tool_call>",
           f"<minimax:tool_call>\n{invoke('Rome')}{invoke('Oslo')}</minimax:tool_call>",
           '<minimax:tool_call><invoke name="now"></invoke></minimax:tool_call>'),
    Family("dsml", "｜DSML｜ function_calls", dsml("function_calls", invoke("Rome", "｜DSML｜", STRINGS)),
           dsml("function_calls", *(invoke(c, "｜DSML｜", STRINGS) for c in ("Rome", "Oslo"))),
           dsml("function_calls", NO_CALL)),
    Family("dsml-v4", "｜DSML｜ tool_calls", dsml("tool_calls", invoke("Rome", "｜DSML｜", STRINGS)),
           dsml("tool_calls", *(invoke(c, "｜DSML｜", STRINGS) for c in ("Rome", "Oslo"))),
           dsml("tool_calls", NO_CALL)),
    Family("deepseek-v3", f"{DEEPSEEK} ```json", deepseek(v3(ROME_JSON)),
           deepseek(v3(ROME_JSON), v3(OSLO_JSON)), deepseek(v3("{}", "now"))),
    Family("deepseek-v3.1", DEEPSEEK, deepseek(f"get_weather<｜tool▁sep｜>{ROME_JSON}"),
           deepseek(*(f"get_weather<｜tool▁sep｜>{each}" for each in (ROME_JSON, OSLO_JSON))),
           deepseek("now<｜tool▁sep｜>{}")),
    Family("kimi", "<|tool_calls_section_begin|>",
           kimi(f"functions.get_weather:0<|tool_call_argument_begin|>{ROME_JSON}"),
           kimi(*(f"functions.get_weather:{i}<|tool_call_argument_begin|>{each}"
                  for i, each in enumerate((ROME_JSON, OSLO_JSON)))),
           kimi("functions.now:7<|tool_call_argument_begin|>{}")),
    Family("mistral", "[TOOL_CALLS]", f"[TOOL_CALLS]get_weather[ARGS]{ROME_JSON}",
           f"[TOOL_CALLS]get_weather[ARGS]{ROME_JSON}[TOOL_CALLS]get_weather{OSLO_JSON}",
           '[TOOL_CALLS] [{"name": "now", "arguments": {}}]'),
    Family("mistral", "[TOOL_CALLS]", f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {ROME_JSON}}}]',
           "[TOOL_CALLS] [" + ", ".join(f'{{"name": "get_weather", "arguments": {each}}}'
                                        for each in (ROME_JSON, OSLO_JSON)) + "]",
           "[TOOL_CALLS]now[CALL_ID]abcdefghi[ARGS]{}"),
    Family("llama3", "tools parameters ipython", f'{{"name": "get_weather", "parameters": {ROME_JSON}}}',
           "; ".join(f'{{"name": "get_weather", "parameters": {each}}}' for each in (ROME_JSON, OSLO_JSON)),
           '<|python_tag|>{"name": "now", "parameters": {}}'),
    Family("lfm2", "<|tool_call_start|>", '<|tool_call_start|>[get_weather(city="Rome", days=3)]<|tool_call_end|>',
           "<|tool_call_start|>[get_weather(city='Rome', days=3), get_weather(city='Oslo', days=3)]<|tool_call_end|>",
           "<|tool_call_start|>[now()]<|tool_call_end|>"),
    Family("olmo3", "<function_calls>", '<function_calls>\nget_weather(city="Rome", days=3)\n</function_calls>',
           '<function_calls>get_weather(city="Rome", days=3)\nget_weather(city="Oslo", days=3)</function_calls>',
           "<function_calls>now()</function_calls>"),
    Family("gemma4", "", '<|tool_call>call:get_weather{city:<|"|>Rome<|"|>,days:3}<tool_call|>',
           "".join(f'<|tool_call>call:get_weather{{city:<|"|>{c}<|"|>,days:3}}<tool_call|>' for c in ("Rome", "Oslo")),
           "<|tool_call>call:now{}<tool_call|>"),
    Family("pythonic", "", '[get_weather(city="Rome", days=3)]',
           '[get_weather(city="Rome", days=3), get_weather(city="Oslo", days=3)]', "[now()]"),
]  # fmt: skip


SPELLED = [
    pytest.param(each.values, marks=each.marks, id=f"{each.values[0].name}-{each.values[1]}")
    for each in each_value(FAMILIES, ["tokens", "special", "text"])
]


@pytest.fixture(scope="module", params=SPELLED)
def spelled(request: pytest.FixtureRequest) -> tuple[Family, str]:
    found: tuple[Family, str] = request.param
    return found


@pytest.fixture(scope="module")
def case(spelled: tuple[Family, str]) -> Family:
    return spelled[0]


@pytest.fixture(scope="module")
def tokenizer(spelled: tuple[Family, str]) -> Tokenizer:
    """With a token for each marker that the family has, or with some that are spelled."""
    case, kind = spelled
    if kind == "text":
        return family((), f"{case.says}")
    markers = KINDS[case.name].spellings
    return family(markers, case.says, special=kind == "special")


def read(tokenizer: Tokenizer, case: Family, reply: str, **options: Any) -> Any:
    return said(tokenizer, reply, replies=tokenizer.replies.with_tools(case.name), **options)


def test_every_family_is_here() -> None:
    assert {case.name for case in FAMILIES} | {"hermes"} == set(KINDS)
    assert set(FORMATS) == {"auto", "none", "harmony", *KINDS}


def test_a_call(tokenizer: Tokenizer, case: Family) -> None:
    found = read(tokenizer, case, case.one)
    assert [(name, json.loads(text)) for name, text in calls(found)] == [("get_weather", ROME)]
    assert (found.content, found.reasoning) == (None, None)


def test_two_calls(tokenizer: Tokenizer, case: Family) -> None:
    found = read(tokenizer, case, case.two)
    wanted = [("get_weather", ROME), ("get_weather", {"city": "Oslo", "days": 3})]
    assert [(name, json.loads(text)) for name, text in calls(found)] == wanted
    assert found.content is None and len({call.id for call in found.calls}) == 2


def test_a_call_without_arguments(tokenizer: Tokenizer, case: Family) -> None:
    assert calls(read(tokenizer, case, case.bare)) == [("now", "{}")]


@pytest.mark.parametrize("case", FAMILIES, ids=lambda each: each.name)
def test_a_call_that_breaks_off(case: Family) -> None:
    """In front of its beginning it is content; behind it its arguments are what there is. Nothing
    is said twice, and nothing that is no call is lost."""
    tokenizer = family()
    replies = tokenizer.replies.with_tools(case.name)
    for length in range(1, len(case.one)):
        found = fold(events(tokenizer, case.one[:length], replies=replies))
        if not found.calls:
            assert (found.content or "").strip() == case.one[:length].strip()
        else:
            assert found.content is None


def test_text_before_and_behind(tokenizer: Tokenizer, case: Family) -> None:
    if case.name in ("llama3", "pythonic"):
        return  # a call is what the whole reply begins with
    found = read(tokenizer, case, f"I look.\n\n{case.one}\nDone.")
    assert (found.content, len(found.calls)) == ("I look.\n\nDone.", 1)


DETECTED = [case for case in FAMILIES if case.says]


@pytest.mark.parametrize("case", DETECTED, ids=lambda each: each.name)
def test_a_template_tells_its_format(case: Family) -> None:
    assert family((), case.says).replies.tools == case.name


WRITTEN = {
    "chatml": None,
    "hermes": "hermes",
    "qwen3_first": "hermes",
    "qwen3": "hermes",
    "qwen3_coder": "qwen-xml",
    "mistral": "mistral",
}


@pytest.mark.parametrize("name", WRITTEN)
def test_templates_of_models_tell_their_format(name: str) -> None:
    assert family(template=TEMPLATES[name].source).replies.tools == WRITTEN[name]


def test_a_vocabulary_tells_its_format() -> None:
    for name in ("kimi", "deepseek-v3.1", "glm", "gemma4", "lfm2", "mistral"):
        assert family(KINDS[name].spellings, special=True).replies.tools == name
    assert family(("<|python_start|>",), "tools").replies.tools == "pythonic"
    assert family(("<|python_tag|>",), "tools").replies.tools == "llama3"
    assert family().replies.tools is None
    assert family((), "<tool_call>").replies.with_tools("none").tools is None
    with pytest.raises(ConfigError, match="tool_format is 'qwen'; it must be one of auto, none, "):
        family().replies.with_tools("qwen")


def test_ids_in_a_formats_own_form() -> None:
    tokenizer = family()
    found = fold(events(tokenizer, FAMILIES[8].two, replies=tokenizer.replies.with_tools("kimi")))
    assert [call.id for call in found.calls] == [
        "functions.get_weather:0",
        "functions.get_weather:1",
    ]
    mistral = tokenizer.replies.with_tools("mistral")
    [call] = fold(events(tokenizer, FAMILIES[9].one, replies=mistral)).calls
    assert len(call.id) == 9 and call.id.isalnum()
    [call] = fold(events(tokenizer, FAMILIES[10].bare, replies=mistral)).calls
    assert call.id == "abcdefghi"


VALUES = [
    ("3", {"type": "integer"}, 3),
    ("3", {"type": "string"}, "3"),
    ("3.5", {"type": "integer"}, "3.5"),
    ("-2.5e3", {"type": "number"}, -2500.0),
    ("NaN", {"type": "number"}, "NaN"),
    ("True", {"type": "boolean"}, True),
    ("null", {"type": "string"}, "null"),
    ("null", {"type": ["string", "null"]}, None),
    ("null", {"anyOf": [{"type": "integer"}, {"type": "null"}]}, None),
    ('{"a": [1]}', {"type": "object"}, {"a": [1]}),
    ('{"a": [NaN]}', {"type": "object"}, '{"a": [NaN]}'),
    ("[1, 2]", {"$ref": "#/$defs/list"}, [1, 2]),
    ("[1, 2", {"type": "array"}, "[1, 2"),
    ("b", {"enum": ["a", "b"]}, "b"),
    ("2", {"enum": [1, 2]}, 2),
    ("x &lt; y", {"type": "string"}, "x &lt; y"),
    ("7", None, 7),
    ("seven", None, "seven"),
    ("null", None, "null"),
    ("3", {"$ref": "#/properties/key"}, 3),
]


@pytest.mark.parametrize(("text", "schema", "value"), VALUES)
def test_values_by_the_tools_schema(text: str, schema: Any, value: Any) -> None:
    properties = {} if schema is None else {"key": schema}
    parameters = {
        "type": "object",
        "properties": properties,
        "$defs": {"list": {"type": "array"}},
    }
    tokenizer = family((), "<function= <parameter= <tool_call>")
    reply = f"<function=f>\n<parameter=key>\n{text}\n</parameter>\n</function>"
    [(_, arguments)] = calls(said(tokenizer, tool_calls(reply), tools={"f": parameters}))
    found = json.loads(arguments)["key"]
    assert (found, type(found)) == (value, type(value))


def test_strings_come_as_they_are_written() -> None:
    tokenizer = family((), "<function= <parameter= <tool_call>")
    text = 'def f():\n\treturn "</p" < x\n\n'
    reply = tool_calls(xml(text))
    found = events(tokenizer, reply, range(len(reply)))
    pieces = [event.text for event in found if isinstance(event, CallArguments)]
    assert json.loads("".join(pieces)) == {"city": text} and len(pieces) > len(text) // 2


def test_a_call_without_its_opener() -> None:
    """Some of Qwen's models begin at the function."""
    tokenizer = family((), "<function= <parameter= <tool_call>")
    found = said(tokenizer, xml("Rome") + "\n</tool_call>")
    assert (calls(found), found.content) == ([("get_weather", '{"city": "Rome"}')], None)


PYTHONIC = [
    ("[f(a=None, b=True, c=[1, 2.5], d={'x': (1,)})]", {"a": None, "b": True, "c": [1, 2.5], "d": {"x": [1]}}),
    ("[f(a=null, b=true)]", {"a": None, "b": True}),
    ("[f(a='it\\'s, (so)]', b=\"]\")]", {"a": "it's, (so)]", "b": "]"}),
    ("[f(a=-1)]", {"a": -1}),
]  # fmt: skip
NOT_PYTHONIC = [
    "[f(open('x'))]",
    "[f(a=open('x'))]",
    "[f(a=b)]",
    "[f(a=1+x)]",
    "[a link](https://example.com)",
    "[1, 2, 3]",
    "[f(a={1, 2})]",
    "[f(a=" + "[" * 5000 + "]" * 5000 + ")]",
]


@pytest.mark.parametrize(("reply", "arguments"), PYTHONIC)
def test_python_literals(reply: str, arguments: Any) -> None:
    tokenizer = family()
    found = said(tokenizer, reply, replies=tokenizer.replies.with_tools("pythonic"))
    assert json.loads(calls(found)[0][1]) == arguments


@pytest.mark.parametrize("reply", NOT_PYTHONIC, ids=range(len(NOT_PYTHONIC)))
def test_nothing_is_computed(reply: str) -> None:
    tokenizer = family()
    found = fold(events(tokenizer, reply, replies=tokenizer.replies.with_tools("pythonic")))
    assert (found.content, found.calls) == (reply, ())


def test_json_that_is_no_call_is_content() -> None:
    tokenizer = family((), "tools parameters ipython")
    reply = '{"name": "Rome", "people": 2800000}'
    found = said(tokenizer, reply)
    assert (found.content, found.calls) == (reply, ())


def test_gemmas_own_notation() -> None:
    tokenizer = family(KINDS["gemma4"].spellings)
    reply = '<|tool_call>call:f{a:[1,<|"|>x, {y}<|"|>,{b:true}],c:null,d:-2.5,<|"|>e f<|"|>:{}}<tool_call|>'
    found = said(tokenizer, reply)
    wanted = {"a": [1, "x, {y}", {"b": True}], "c": None, "d": -2.5, "e f": {}}
    assert json.loads(calls(found)[0][1]) == wanted
    # A number is passed on as it is written, and words that JSON lacks are none.
    big = said(tokenizer, "<|tool_call>call:f{a:1e999,b:1.50}<tool_call|>")
    assert calls(big) == [("f", '{"a": 1e999, "b": 1.50}')]
    for word in ("NaN", "[Infinity]", "True", "1.", ""):
        reply = f"<|tool_call>call:f{{a:{word}}}<tool_call|>"
        assert said(tokenizer, reply).content == reply


THINKING = [
    ("<|channel>thought\nHm.<channel|>Hi", ("<|channel>", "<channel|>")),
    ("[THINK]Hm.[/THINK]Hi", ("[THINK]", "[/THINK]")),
    ("<seed:think>Hm.</seed:think>Hi", ("<seed:think>", "</seed:think>")),
    ("<think>\nHm.\n</think>\n\nHi", ("<think>", "</think>")),
    (
        "Here is my thought process: Hm.Here is my response:Hi",
        ("Here is my thought process:", "Here is my response:"),
    ),
]


@pytest.mark.parametrize("kind", ["tokens", "text"])
@pytest.mark.parametrize(("reply", "markers"), THINKING)
def test_reasoning_of_each_family(reply: str, markers: tuple[str, str], kind: str) -> None:
    tokenizer = family(markers if kind == "tokens" else (), " ".join(markers))
    found = said(tokenizer, reply)
    assert ((found.reasoning or "").strip(), found.content) == ("Hm.", "Hi")
    assert tokenizer.replies.reasoning == markers[0]
    assert family().replies.reasoning is None
