"""Jinja2 for chat templates: the immutable sandbox, with a meter on time and on text.

A template is the operator's, but it comes with a downloaded model and works on clients' words. The
sandbox keeps it away from Python's inside; the meter ends what never would. It is woven into the
template's syntax tree: every turn of a loop looks at the clock, every text that an expression makes
is counted, whether it is sent or kept in a variable.
"""

import json
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_SECONDS = 5.0
MAX_CHARACTERS = 2**26
_MAX_BITS = 4096


class TemplateLimitError(jinja2.TemplateError):
    """A rendering took too long or made too much text."""


@dataclass(slots=True)
class _Meter:
    deadline: float
    seconds: float
    characters: int
    left: int

    def tick(self) -> None:
        if time.monotonic() > self.deadline:
            raise TemplateLimitError(f"the chat template ran longer than {self.seconds:g} s")

    def spend(self, characters: int) -> None:
        self.left -= characters
        if self.left < 0:
            raise TemplateLimitError(
                f"the chat template makes more than {self.characters} characters"
            )
        self.tick()


class _Weaver(NodeTransformer):
    """Puts the environment's `tick` and `count` into a template's syntax tree."""

    def _call(self, name: str, arguments: list[nodes.Expr], lineno: int) -> nodes.Call:
        call = nodes.Call(nodes.EnvironmentAttribute(name), arguments, [], None, None)
        call.set_lineno(lineno)
        return call

    def _counted(self, node: nodes.Expr) -> nodes.Expr:
        self.generic_visit(node)
        return self._call("count", [node], node.lineno)

    visit_Call = visit_Filter = visit_Concat = visit_Add = visit_Mul = visit_Mod = _counted

    def _looping(self, node: nodes.For | nodes.Macro) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(self._call("tick", [], node.lineno), lineno=node.lineno))
        return node

    visit_For = visit_Macro = _looping

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        for i, child in enumerate(node.nodes):
            if not isinstance(child, nodes.TemplateData):
                node.nodes[i] = self._call("count", [child], child.lineno)
        return node

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        # The grammar of jinja's compiler wants the bare call and the bare filters here.
        call = node.call
        node.call = nodes.Call(nodes.Const(None), [], [], None, None)
        self.generic_visit(call)
        node.body = [self.visit(child) for child in node.body]
        node.call = call
        return node

    def _filtered_block(self, node: nodes.FilterBlock | nodes.AssignBlock) -> nodes.Node:
        node.body = [self.visit(child) for child in node.body]
        return node

    visit_FilterBlock = visit_AssignBlock = _filtered_block


class _GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's text for training; when serving it is a scope."""

    tags = {"generation"}  # noqa: RUF012 (jinja declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        return nodes.Scope(
            parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=lineno
        )


def _raise_exception(message: object) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """The environment that chat templates expect: transformers' flags, functions and filters."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"],
        )
        del self.globals["lipsum"]
        self.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
        self.filters["tojson"] = _tojson
        self._running = threading.local()

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = _Weaver().visit(super()._parse(source, name, filename))
        return tree.set_environment(self)  # type: ignore[no-any-return]

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Refuse a product or power that is huge before it is computed."""
        meter: _Meter = self._running.meter
        if operator == "*":
            for text, times in ((left, right), (right, left)):
                if isinstance(text, (str, list, tuple)) and isinstance(times, int):
                    meter.spend(len(text) * max(times, 0))
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() + right.bit_length()
            if operator == "**":
                bits = left.bit_length() * max(right, 1)
            if bits > _MAX_BITS:
                raise TemplateLimitError(
                    f"the chat template computes a number of more than {_MAX_BITS} bits"
                )
        return super().call_binop(context, operator, left, right)

    def tick(self) -> None:
        """Called by the woven template at every turn of a loop."""
        self._running.meter.tick()

    def count(self, value: Any) -> Any:
        """Called by the woven template on every value that an expression makes; hands it on."""
        if isinstance(value, (str, list, tuple)):
            self._running.meter.spend(len(value))
        return value

    def run(
        self,
        template: jinja2.Template,
        variables: Mapping[str, Any],
        *,
        seconds: float,
        characters: int,
    ) -> str:
        """Render within `seconds` and `characters` (all that expressions make, sent or not)."""
        meter = _Meter(time.monotonic() + seconds, seconds, characters, characters)
        self._running.meter = meter
        pieces: list[str] = []
        for piece in template.generate(**variables):
            meter.spend(len(piece))
            pieces.append(piece)
        return "".join(pieces)
