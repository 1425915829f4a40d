"""Reads the string below each field of an attrs class: the reference text of its key."""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import Any


def field_docs(kind: type[Any]) -> dict[str, str]:
    """Return field name to its docstring, inherited ones included; empty where the source cannot be read."""
    docs: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        docs |= _own_docs(base)
    return docs


def class_doc(kind: type[Any]) -> str:
    """Return the docstring of a class; empty where attrs or Python made one up."""
    own = kind.__dict__.get("__doc__")
    return inspect.cleandoc(own) if isinstance(own, str) else ""


def _own_docs(kind: type[Any]) -> dict[str, str]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError, SyntaxError):
        return {}
    (definition,) = tree.body
    if not isinstance(definition, ast.ClassDef):
        return {}
    docs = {}
    for field, after in zip(definition.body, definition.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
            and isinstance(after.value.value, str)
        ):
            docs[field.target.id] = " ".join(after.value.value.split())
    return docs
