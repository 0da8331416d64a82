"""A griffe extension: comments behind arguments, fields and returns (docments) become what mkdocstrings shows in tables."""

import ast
import tokenize
from functools import cache
from pathlib import Path

import griffe
from maths import formulas


@cache
def comments(path: Path) -> dict[int, str]:
    "The comment on each line of a file, without its sign."
    with open(path, "rb") as file:
        return {t.start[0]: t.string.lstrip("# ").strip() for t in tokenize.tokenize(file.readline) if t.type == tokenize.COMMENT}


def docments(node: ast.FunctionDef, notes: dict[int, str]) -> dict[str, str]:
    "Comment of each argument that has one, and of 'return'; on a line of its own each, or the line's comment is the return's."
    returned = node.returns.end_lineno if node.returns else None
    spec = node.args
    named = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, *(a for a in (spec.vararg, spec.kwarg) if a)]
    positional = [*spec.posonlyargs, *spec.args]
    defaults = dict(zip([a.arg for a in positional[len(positional) - len(spec.defaults):]], spec.defaults))
    defaults |= {a.arg: d for a, d in zip(spec.kwonlyargs, spec.kw_defaults) if d}
    found = {}
    for argument in named:
        line = defaults.get(argument.arg, argument).end_lineno
        if line in notes and line != returned: found[argument.arg] = notes[line]
    if returned in notes and node.body[0].lineno > returned: found["return"] = notes[returned]
    return found


def text(obj: griffe.Object) -> list[griffe.DocstringSection]:
    "The docstring itself, with formulas as MathML."
    return [griffe.DocstringSectionText(formulas(obj.docstring.value))] if obj.docstring else []


def as_docstring(obj: griffe.Object, sections: list[griffe.DocstringSection]) -> None:
    "Let an object show these sections."
    if not sections: return
    if obj.docstring is None: obj.docstring = griffe.Docstring("-", parent=obj)
    obj.docstring.__dict__["parsed"] = sections  # what the cached property would have parsed


def is_setting(value: ast.expr | None) -> bool:
    "Is this a field of the recipe: `_setting(value, reason, paper)`?"
    return isinstance(value, ast.Call) and getattr(value.func, "id", "") == "_setting"


def field(node: ast.AnnAssign, path: Path) -> str:
    "What is said of a field: the comment behind it, or the reason of a field of the recipe."
    if is_setting(node.value):
        reason, paper = [*map(ast.literal_eval, node.value.args[1:3]), "not said"][:2]
        return f"{reason} (the paper: {paper})"
    return comments(path).get(node.end_lineno, "")


class Docments(griffe.Extension):
    "Arguments and returns from their comments; fields of named tuples and dataclasses too."

    def on_function_instance(self, *, node: ast.AST, func: griffe.Function, **kwargs: object) -> None:
        if func.name.startswith("_"): return
        said, sections = docments(node, comments(func.filepath)), text(func)
        rows = [griffe.DocstringParameter(p.name, annotation=p.annotation, description=said.get(p.name, ""), value=p.default)
                for p in func.parameters if p.name not in ("self", "cls")]
        if rows: sections.append(griffe.DocstringSectionParameters(rows))
        if func.returns is not None and str(func.returns) != "None":
            sections.append(griffe.DocstringSectionReturns(
                [griffe.DocstringReturn("", annotation=func.returns, description=said.get("return", ""))]))
        as_docstring(func, sections)

    def on_class_members(self, *, node: ast.AST, cls: griffe.Class, **kwargs: object) -> None:
        if cls.name.startswith("_"): return
        fields = [n for n in node.body if isinstance(n, ast.AnnAssign) and not n.target.id.startswith("_")]
        for n in fields:  # the recipe's own value, without paper and reason
            if is_setting(n.value): cls.members[n.target.id].value = ast.unparse(n.value.args[0])
        rows = [griffe.DocstringAttribute(n.target.id, annotation=cls.members[n.target.id].annotation, description=field(n, cls.filepath))
                for n in fields]
        as_docstring(cls, text(cls) + ([griffe.DocstringSectionAttributes(rows)] if rows else []))
