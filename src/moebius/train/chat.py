"""Short conversations made from the training documents by rule, so that training has seen the chat template.

No text is invented: a question is a fixed phrase around a function's name, signature or docstring, or around a help
topic's name; the answer is the function's own source, its docstring's first paragraph, or the topic's first paragraph.
"""

import ast
import hashlib
import textwrap
import warnings
from collections.abc import Iterable, Iterator

from moebius.train.corpus import Document

Message = dict[str, str]
_MAX_ANSWER = 1200
_MIN_ANSWER = 40


def conversations(documents: Iterable[Document], limit: int, seed: int) -> list[list[Message]]:
    """At most `limit` conversations of two messages, from `documents` of kind library and docs.

    Which ones, and their order, follow from a hash of `seed` and the text alone.
    """
    found: dict[str, list[Message]] = {}
    for document in documents:
        makers = {"library": _about_functions, "docs": _about_topic}
        if document.kind in makers:
            for question, answer in makers[document.kind](document):
                if _MIN_ANSWER <= len(answer) <= _MAX_ANSWER:
                    key = hashlib.sha256(f"{seed}\0{question}\0{answer}".encode()).hexdigest()
                    found[key] = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return [found[key] for key in sorted(found)[:limit]]


def _about_functions(document: Document) -> Iterator[tuple[str, str]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.parse(document.text)
    lines = document.text.split("\n")
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("__"):
            continue
        source = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
        noun = "class" if isinstance(node, ast.ClassDef) else "function"
        docstring = ast.get_docstring(node)
        if docstring:
            summary = " ".join(docstring.split("\n\n")[0].split())
            yield f"Write a Python {noun} `{node.name}`: {summary}", source
            yield f"What does the {noun} `{node.name}` do?", docstring.split("\n\n")[0]
        head, _, body = source.partition("\n")
        if body and head.rstrip().endswith(":"):
            yield f"Complete this Python code:\n{head}", source


def _about_topic(document: Document) -> Iterator[tuple[str, str]]:
    name = document.path.rsplit("/", 1)[-1]
    paragraphs = [p for p in document.text.split("\n\n") if len(p) >= _MIN_ANSWER and not set(p) <= set("*=-~\n ")]
    if paragraphs:
        yield f"Explain the Python topic `{name}`.", paragraphs[0]
