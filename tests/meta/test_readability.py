"""Docstrings open with an imperative verb or a noun phrase, variables are named for their element,
and files are short."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("reft", "reft_kernels", "benchmarks", "tests", "scripts")
#: Docstring openers of a sentence that has no verb, or whose subject comes last.
OPENERS = ("As ", "Of ", "Those ", "The same ", "Where ", "Who ", "What ")
#: Variable names that say nothing: name the adapter, tensor, row or result instead.
EMPTY_NAMES = {"one", "found", "own", "mine"}
#: Docstrings, comments and blank lines do not count.
MOST_LINES_OF_CODE = 300
NOT_CODE = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
    tokenize.ENDMARKER,
}  # fmt: skip


@cache
def _sources() -> dict[str, tuple[str, ast.Module]]:
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    texts = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in paths}
    assert len(texts) > 100
    return {name: (text, ast.parse(text)) for name, text in texts.items()}


def _docstrings(tree: ast.Module) -> Iterator[ast.Constant]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            match node.body:
                case [ast.Expr(ast.Constant(str()) as docstring), *_]:
                    yield docstring


def _bound_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield (line, name) of every variable, argument, attribute, function and class."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield node.lineno, name
            case ast.arg(arg=name) | ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                yield node.lineno, name


def _lines_of_code(text: str, tree: ast.Module) -> int:
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NOT_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for docstring in _docstrings(tree):
        lines.difference_update(range(docstring.lineno, docstring.end_lineno + 1))
    return len(lines)


def test_docstrings_open_with_a_verb_or_a_noun() -> None:
    wrong = [
        f"{name}:{docstring.lineno}: {docstring.value.splitlines()[0]}"
        for name, (_, tree) in _sources().items()
        for docstring in _docstrings(tree)
        if docstring.value.startswith(OPENERS)
    ]
    assert not wrong, "\n".join(wrong)


def test_variables_are_named_for_their_element() -> None:
    wrong = [
        f"{name}:{line}: {variable}"
        for name, (_, tree) in _sources().items()
        for line, variable in _bound_names(tree)
        if variable in EMPTY_NAMES
    ]
    assert not wrong, "\n".join(wrong)


def test_files_have_at_most_300_lines_of_code() -> None:
    sizes = {name: _lines_of_code(text, tree) for name, (text, tree) in _sources().items()}
    assert not {name: size for name, size in sizes.items() if size > MOST_LINES_OF_CODE}
