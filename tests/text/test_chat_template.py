from __future__ import annotations

import json
import time

import pytest
from transformers import PreTrainedTokenizerFast

from moebius.errors import RequestError, TokenizerError
from moebius.text.chat import ChatTemplate, normalise_messages
from moebius.text.probe import TemplateFacts
from text.tiny_tokenizers import byte_level

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "<b>Grüße</b> & 'quotes'\n"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "last"},
]
TOOLS = [
    {
        "type": "function",
        "function": {"name": "f", "parameters": {"x": "é<>&"}, "list": [1, 2.5, None, True]},
    }
]

# What real templates use: each is rendered by transformers too.
TEMPLATES = [
    "{%- for m in messages -%}\n  {{- m.role }}: {{ m['content'] | trim }}\n{% endfor %}{{ "
    "eos_token }}",
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{% set x = 1 %}{{ "
    "m.content }}{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{{ x }}{% endif %}{% "
    "endfor %}",
    "{% set ns = namespace(n=0, last='') %}{% for m in messages[::-1] %}{% set ns.n = ns.n + "
    "loop.index0 * 2 %}{% set ns.last = ns.last ~ m.role ~ loop.last %}{% endfor %}{{ ns.n }}{{ "
    "ns.last }}{{ 7 % 4 }}{{ 2 ** 5 }}{{ '-' * 3 }}",
    "{{ tools | tojson(indent=2) }}{{ tools | tojson }}{{ tools | map(attribute='type') | "
    "join(',') }}",
    "{% macro show(m, depth=0) %}{{ m.role ~ depth }}{% if depth < 3 %}{{ show(m, depth + 1) }}{% "
    "endif %}{% endmacro %}{% for m in messages %}{{ show(m) }}{% endfor %}",
    "{% macro wrap() %}[{{ caller('a') }}]{% endmacro %}{% call(v) wrap() %}{{ v }}{{ "
    "messages[0].content }}{% endcall %}",
    "{% filter upper | replace('A', 'b' ~ 'c') %}{{ messages[0].content }}aa{% endfilter %}{% set "
    "block | trim %}  {{ messages[1].content }} {% endset %}{{ block }}",
    "{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% elif loop.last %}{% break "
    "%}{% endif %}{{ m.content }}{% else %}none{% endfor %}",
    "{% for item in [1, [2, [3]]] recursive %}{% if item is iterable %}({{ loop(item) }}){% else "
    "%}{{ item }}{% endif %}{% endfor %}",
    "{{ strftime_now('%Y') }}{{ 'abc'.split('b')[1] }}{{ '%s-%03d' % ('a', 7) }}{{ missing is "
    "defined }}{{ dict(a=1).items() | list }}{{ '{:>4}'.format('x') }}{{ loop is undefined }}{{ "
    "messages | length }}{{ range(3) | list }}",
    "{% if tools is not none and documents is none %}{{ bos_token }}{% endif %}{{ "
    "messages[0]['content'].startswith('Be') }}{{ messages | selectattr('role', 'equalto', 'user') "
    "| list | tojson }}{{ messages[5].content }}",
]


@pytest.fixture(scope="module")
def theirs() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=byte_level(), bos_token="<s>", eos_token="</s>")


def variables(messages=MESSAGES, **more):
    return {
        "messages": messages,
        "tools": TOOLS,
        "documents": None,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "add_generation_prompt": True,
        **more,
    }


@pytest.mark.parametrize("source", TEMPLATES)
def test_renders_as_transformers_does(theirs, source):
    def outcome(render):
        try:
            return render()
        except Exception:
            return "refused"

    expected = outcome(
        lambda: theirs.apply_chat_template(
            MESSAGES, tools=TOOLS, chat_template=source, tokenize=False, add_generation_prompt=True
        )
    )
    assert outcome(lambda: ChatTemplate(source).render(variables())) == expected


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ ''['__class__']['__mro__'] }}",
        "{{ (messages | attr('__class__')).x }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{{ '%s' | format(messages.__class__) ~ ''.__class__.__mro__[1] }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ messages[0].pop('role') }}",
        "{{ lipsum.__globals__ }}",
        "{% include 'other' %}",
        "{% import 'os' as os %}{{ os }}",
        "{{ tick.__self__._running }}",
    ],
)
def test_escapes_from_the_sandbox_are_refused(source):
    messages = [{"role": "user", "content": "x"}]
    with pytest.raises(RequestError) as caught:
        ChatTemplate(source).render(variables(messages))
    assert caught.value.param == "messages"
    assert messages == [{"role": "user", "content": "x"}]


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}"
END = "{% endfor %}{% endfor %}"
DOUBLE = "{% for i in range(99) %}"


@pytest.mark.parametrize(
    "source",
    [
        LOOP + "x" + END,
        LOOP + "{% set x = a %}" + END,
        LOOP + "{% if a %}{% endif %}" + END,
        "{% macro f(n) %}{{ f(n - 1) }}{{ f(n - 1) }}{% endmacro %}{{ f(500) }}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) "
        "}}",
        "{% set ns = namespace(x='aa') %}" + DOUBLE + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x='aa') %}" + DOUBLE + "{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x=['a']) %}" + DOUBLE + "{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x='aa') %}"
        + DOUBLE
        + "{% set ns.x = ns.x.replace('a', 'aa') %}{% endfor %}",
        "{% set ns = namespace(x='aa') %}"
        + DOUBLE
        + "{% set ns.x = ns.x | replace('a', 'aa') %}{% endfor %}",
        "{% set ns = namespace(x='aa') %}"
        + DOUBLE
        + "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}",
        "{% set ns = namespace(x='aa') %}"
        + DOUBLE
        + "{% set ns.x = '%s%s' % (ns.x, ns.x) %}{% endfor %}",
        "{{ 'x' * 10 ** 12 }}",
        "{{ 10 ** 12 * [1] }}",
        "{{ 9 ** (9 ** 9) }}",
        "{% set ns = namespace(x=3) %}" + DOUBLE + "{% set ns.x = ns.x * ns.x %}{% endfor %}",
        "{{ range(10 ** 9) | list }}",
        "{{ messages[0].content * 2 }}" * 100,
    ],
)
def test_a_runaway_template_is_stopped(source):
    template = ChatTemplate(source)
    grows = DOUBLE in source  # must be stopped by its size, long before it is slow
    reason = "more than 1000000 characters|more than 4096 bits" if grows else "chat template"
    start = time.monotonic()
    with pytest.raises(RequestError, match=reason) as caught:
        messages = [{"role": "user", "content": "y" * 100_000}]
        template.render(variables(messages), seconds=2 if grows else 0.2, characters=10**6)
    assert time.monotonic() - start < 2
    assert caught.value.param == "messages"


def test_limits_leave_a_large_chat_alone():
    messages = [
        {"role": "user", "content": "word " * 400}
    ] * 4096  # as many as a request may hold, 8 MB
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role + '\\n' + m.content | trim "
        "}}<|im_end|>\n{% endfor %}"
    )
    text = ChatTemplate(source).render(variables(messages))
    assert text.count("word") == 400 * 4096


def test_the_templates_own_words_reach_the_client():
    source = (
        "{% if messages[0].role != 'user' %}{{ raise_exception('roles must\n alternate') }}{% "
        "endif %}ok"
    )
    with pytest.raises(RequestError, match=r"refuses these messages: roles must alternate$"):
        ChatTemplate(source).render(variables())
    assert ChatTemplate(source).render(variables(MESSAGES[1:])) == "ok"
    with pytest.raises(RequestError, match="has no element 9"):
        ChatTemplate("{{ messages[9].content.x }}").render(variables())


def test_broken_templates_are_the_operators_error():
    for source in ("{% for %}", "{{ 1", "{% unknown %}"):
        with pytest.raises(TokenizerError, match="chat template 'mine', line 1"):
            ChatTemplate(source, "mine")


def normal(*messages, **facts):
    return normalise_messages(messages, TemplateFacts(**facts))


def test_messages_become_what_templates_expect():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert normal({"role": "user", "content": parts, "name": None}) == [
        {"role": "user", "content": "a\nb"}
    ]
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": [1]}'}}
    assert normal({"role": "assistant", "content": None, "tool_calls": [call]}) == [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": [1]}}}
            ],
        }
    ]
    assert json.loads(call["function"]["arguments"]) == {
        "x": [1]
    }  # the client's own object is left alone
    developer = {"role": "developer", "content": "x"}
    assert normal(developer, developer=True)[0]["role"] == "developer"
    assert normal(developer)[0]["role"] == "system"
    assert developer["role"] == "developer"


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ("hello", "messages[1]"),
        ({"content": "x"}, "messages[1].role"),
        ({"role": "<|im_end|>", "content": "x"}, "messages[1].role"),
        ({"role": ["user"], "content": "x"}, "messages[1].role"),
        ({"role": "user"}, "messages[1].content"),
        ({"role": "user", "content": None}, "messages[1].content"),
        ({"role": "user", "content": 3}, "messages[1].content"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {}}]},
            "messages[1].content",
        ),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[1].content"),
        ({"role": "user", "content": [3]}, "messages[1].content"),
        ({"role": "assistant", "tool_calls": {}}, "messages[1].tool_calls"),
        ({"role": "assistant", "tool_calls": [{}]}, "messages[1].tool_calls[0]"),
        ({"role": "assistant", "tool_calls": [3]}, "messages[1].tool_calls[0]"),
        (
            {"role": "assistant", "tool_calls": [{"function": {}}]},
            "messages[1].tool_calls[0].function.name",
        ),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": ""}}]},
            "messages[1].tool_calls[0].function.name",
        ),
        ({"role": "tool", "tool_call_id": "1"}, "messages[1].content"),
    ],
)
def test_wrong_messages_are_named(message, param):
    with pytest.raises(RequestError) as caught:
        normal({"role": "user", "content": "fine"}, message)
    assert caught.value.param == param and str(caught.value).startswith(f"{param}: ")


def test_no_messages_at_all():
    with pytest.raises(RequestError, match="at least one"):
        normal()
