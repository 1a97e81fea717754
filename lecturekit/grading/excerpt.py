"""Cut out of a module what a few of its names need to run, as source: a driver for the jail, or one reference.

What a statement uses is read from its byte code, so a local variable that is called like a function is no use of it,
and an annotation, which ``from __future__ import annotations`` leaves unevaluated, is none either.
"""

from __future__ import annotations
import __future__

import ast
import copy
import dis
import functools
import inspect
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any, TypeGuard

from lecturekit.checking.attempt import call
from lecturekit.checking.question import Question

DRIVER = "driver"
FUTURE = "from __future__ import annotations"
_LOADS = {
    "LOAD_NAME",
    "LOAD_GLOBAL",
    "LOAD_FROM_DICT_OR_GLOBALS",
    "STORE_GLOBAL",
    "DELETE_GLOBAL",
}


@dataclass(frozen=True)
class Excerpt:
    """Part of a module. source: valid module text.   names: the top-level names that it binds."""

    source: str
    names: frozenset[str]


def excerpt(source: str, names: Iterable[str]) -> Excerpt:
    """The top-level statements of a module that bind these names and, in turn, all that they use, in their order.

    Imports are cut down to the names in use. A statement that binds nothing (a call, say) is left out, whatever it does
    to a name that is in. Comments and layout are lost. Raises KeyError for a name that the module does not bind.
    """
    return _cut(ast.parse(source), names)


@functools.lru_cache
def driver_source(question: Question) -> tuple[str, str] | None:
    """A question's driver as (module text, name of the function in it), without its decorators; None for the default.

    Raises ValueError for a driver that is no function at the top level of its module, or whose module uses the name
    ``driver`` for something else.
    """
    drive = question._driver
    if drive is call:
        return None
    if not isinstance(drive, FunctionType):
        raise ValueError(
            f"the driver of {question.id} must be a function at the top level of its module, got {drive!r}"
        )
    tree = ast.parse("".join(inspect.findsource(drive)[0]))
    for place, statement in enumerate(tree.body):
        if isinstance(statement, ast.FunctionDef) and _first_line(statement) == drive.__code__.co_firstlineno:
            renamed = copy.copy(statement)
            renamed.name, renamed.decorator_list = DRIVER, []
            tree.body[place] = renamed
            break
    else:
        raise ValueError(f"the driver of {question.id} must be a function at the top level of its module")
    if sum(DRIVER in _bound(statement) for statement in tree.body) > 1:
        raise ValueError(f"the module of {question.id} uses the name {DRIVER!r}, which its driver gets; rename that")
    return _cut(tree, [DRIVER]).source, DRIVER


def answer_source(candidate: Any, name: str) -> str:
    """A registered misconception or alternative as a student would hand it in: source that defines it under this name.

    candidate: a function or class that stands at the top level of its module, else ValueError.
    """
    tree = ast.parse("".join(inspect.findsource(sys.modules[candidate.__module__])[0]))
    lines = [part.__code__.co_firstlineno for part in (candidate, *vars(candidate).values()) if _is_function(part)]
    for place, statement in enumerate(tree.body):
        if not isinstance(statement, (ast.FunctionDef, ast.ClassDef)) or not lines:
            continue
        if _first_line(statement) <= lines[0] <= (statement.end_lineno or 0):
            renamed = copy.copy(statement)
            renamed.name, renamed.decorator_list = "_answer", []
            tree.body[place] = renamed
            return f"{_cut(tree, ['_answer']).source}\n{name} = _answer\n"
    raise ValueError(f"{candidate!r} must be a function or class at the top level of its module")


def _is_function(part: object) -> TypeGuard[FunctionType]:
    return isinstance(part, FunctionType)


def _cut(tree: ast.Module, names: Iterable[str]) -> Excerpt:
    binders: dict[str, list[int]] = {}
    for place, statement in enumerate(tree.body):
        for name in _bound(statement):
            binders.setdefault(name, []).append(place)
    wanted, kept = list(names), set[int]()
    unknown = [name for name in wanted if name not in binders]
    if unknown:
        raise KeyError(f"the module binds no {', '.join(unknown)}")
    used = set(wanted)
    while wanted:
        for place in set(binders[wanted.pop()]) - kept:
            kept.add(place)
            if _is_import(tree.body[place]):
                continue
            fresh = (_used(tree.body[place]) | _bound(tree.body[place])) & binders.keys() - used
            used |= fresh
            wanted += fresh
    chosen = [_pruned(tree.body[place], used) for place in sorted(kept)]
    text = "\n\n".join([FUTURE, *(ast.unparse(statement) for statement in chosen)])
    return Excerpt(text + "\n", frozenset(name for statement in chosen for name in _bound(statement)))


def _first_line(function: ast.FunctionDef | ast.ClassDef) -> int:
    return min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)])


def _is_import(statement: ast.stmt) -> bool:
    return isinstance(statement, (ast.Import, ast.ImportFrom))


def _pruned(statement: ast.stmt, used: set[str]) -> ast.stmt:
    """An import with the aliases that are used; any other statement as it is."""
    if not isinstance(statement, (ast.Import, ast.ImportFrom)):
        return statement
    pruned = copy.copy(statement)
    pruned.names = [alias for alias in statement.names if (alias.asname or alias.name.partition(".")[0]) in used]
    return pruned


def _bound(statement: ast.stmt) -> set[str]:
    """The global names that running this statement binds."""
    return {
        instruction.argval
        for instruction in dis.get_instructions(_compiled(statement))
        if instruction.opname in ("STORE_NAME", "STORE_GLOBAL")
    } - {"__annotations__"}


def _used(statement: ast.stmt) -> set[str]:
    """The global names that this statement reads when it runs, or that a function or class defined in it may read."""
    return {
        instruction.argval
        for code in _codes(_compiled(statement))
        for instruction in dis.get_instructions(code)
        if instruction.opname in _LOADS
    }


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _compiled(statement: ast.stmt) -> CodeType:
    module = ast.Module([statement], type_ignores=[])
    flags = __future__.annotations.compiler_flag
    return compile(module, "<excerpt>", "exec", flags=flags, dont_inherit=True)
