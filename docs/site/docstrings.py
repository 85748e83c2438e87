"""Griffe extension that reads this package's docstrings: cross-references, tables of options, links to the source.

A docstring refers to `Name`, `Class.method` or `~package.module.Name` in brackets and backticks, as those of
transformers and TRL do. A reference to nothing is an error.
"""

import ast
import re
from typing import Any

import griffe

REFERENCE = re.compile(r"\[`(?P<tilde>~?)(?P<name>[\w.]+)`\](?![\[(])")
OTHERS = ("gymnasium", "lightning", "torch", "transformers", "trl")
"""Libraries whose names docstrings may refer to; a test looks the names up."""
OPTIONS = "rl_plugins.signals.options.Options"
NAMED = re.compile(r"^([\w, ]+): ")
INDENTED = re.compile(r"(?<=:\n)(?P<block>(?: {4}.*\n?)+)")

PARAMETER = re.compile(r"^ {4}(?P<name>\w+) \(.*\):\n(?P<text>(?: {8}.*\n?)+)", re.M)
"""A field with its text, as transformers and TRL write them."""


class UnresolvedReference(Exception):
    """A docstring refers to a name that is not there."""


class Docstrings(griffe.Extension):
    """Rewrite every docstring of the package once it is read."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        """Go through all objects of the package.

        Raises:
            UnresolvedReference: If a docstring refers to nothing.
        """
        loader.resolve_aliases()
        objects = [*descendants(pkg)]
        for obj in objects:
            if isinstance(obj, griffe.Class):
                add_options(obj)
        missing = []
        for obj in objects:
            if obj.docstring is None:
                continue
            text, lost = linked(obj.docstring.value, obj, pkg)
            missing += [f"{obj.path} refers to {name}" for name in lost]
            if isinstance(obj, griffe.Module):
                text = with_lists(text)
            else:
                text += f"\n\n[source][source:{obj.path}]{{ .source }}"
            obj.docstring.value = text
        if missing:
            raise UnresolvedReference("; ".join(missing))


def descendants(obj: griffe.Object) -> Any:
    """All objects that are defined inside of one, itself included."""
    yield obj
    for member in obj.members.values():
        if not member.is_alias:
            yield from descendants(member)


def linked(text: str, obj: griffe.Object, pkg: griffe.Module) -> tuple[str, list[str]]:
    """Turn the references of a docstring into links; give those that lead nowhere."""
    lost: list[str] = []

    def link(match: re.Match[str]) -> str:
        name = match["name"]
        shown = name.rpartition(".")[2] if match["tilde"] else name
        if name.split(".")[0] in OTHERS:
            return f"`{name}`"
        target = find(name, obj, pkg)
        if target is None:
            lost.append(name)
            return f"`{shown}`"
        return f"[`{shown}`][{target}]"

    return REFERENCE.sub(link, text), lost


def find(name: str, obj: griffe.Object, pkg: griffe.Module) -> str | None:
    """Path of what a name means in a docstring: a full path, or a name seen from the object, or a public name."""
    if name.startswith("rl_plugins."):
        return lookup(pkg, name.removeprefix("rl_plugins."))
    scope: Any = obj
    while scope is not None and scope.path != "rl_plugins":
        if path := lookup(scope, name):
            return path
        scope = scope.parent
    found = {lookup(layer, name) for layer in pkg.modules.values()} - {None}
    return found.pop() if len(found) == 1 else None


def lookup(scope: Any, name: str) -> str | None:
    """Path of a member, also an inherited one, where it is defined."""
    if not (scope.is_module or scope.is_class):
        return None
    first, _, rest = name.partition(".")
    try:
        member = scope.all_members[first]
        if rest:
            return lookup(member, rest)
        if member.is_module and first in member.members:
            member = member.members[first]  # a function that is imported from a file of its own name
        return str(member.canonical_path)
    except (KeyError, griffe.AliasResolutionError, griffe.CyclicAliasError):
        return None


# Options


def add_options(obj: griffe.Class) -> None:
    """Give a dataclass of options its signature, and the table of its fields with the text of each.

    Fields are declared by `option(default, text)` or `with_default(kind, name, default)`, from which the class makes
    its docstring when it is imported.
    """
    if not is_options(obj) or obj.docstring is None:
        return
    parameters, texts = {}, {}
    for base in reversed([obj, *obj.mro()]):
        for name, member in base.members.items():
            declared = declaration(member)
            if declared is not None:
                default, text = declared
                texts[name] = text or texts.get(name) or text_of(base, member, name)
                kind = griffe.ParameterKind.positional_or_keyword
                parameters[name] = griffe.Parameter(name, annotation=member.annotation, kind=kind, default=default)
    own = griffe.Parameter("self", kind=griffe.ParameterKind.positional_only)
    init = griffe.Function("__init__", parameters=griffe.Parameters(own, *parameters.values()), parent=obj)
    obj.set_member("__init__", init)
    if "Args:" not in obj.docstring.value:
        before, _, written = obj.docstring.value.partition("\nParameters:\n")
        texts |= {m["name"]: " ".join(m["text"].split()) for m in PARAMETER.finditer(written)}
        lines = [f"    {name}: {text}" for name, text in texts.items() if name in parameters]
        obj.docstring.value = "\n".join([before.rstrip(), "", "Args:", *lines])


def is_options(obj: griffe.Class) -> bool:
    """Whether a class is a dataclass of options, or a config made of them."""
    return any(base.path == OPTIONS for base in obj.mro())


def call_of(member: Any) -> ast.Call | None:
    """The call by which an attribute is declared."""
    if member.is_alias or not member.is_attribute or member.value is None:
        return None
    value = ast.parse(str(member.value), mode="eval").body
    return value if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) else None


def declaration(member: Any) -> tuple[str, str] | None:
    """Default and text of a field; no text where it is that of another dataclass."""
    call = call_of(member)
    if call is None:
        return None
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    if call.func.id == "option":  # type: ignore[attr-defined]
        default = call.args[0] if call.args else given["default"]
        text = call.args[1] if len(call.args) > 1 else given["text"]
        return ast.unparse(default), text_in(text)
    if call.func.id == "with_default":  # type: ignore[attr-defined]
        return ast.unparse(call.args[2] if len(call.args) > 2 else given["default"]), ""
    if call.func.id == "field" and "metadata" in given:  # type: ignore[attr-defined]
        metadata = given["metadata"]
        assert isinstance(metadata, ast.Dict)
        entries = {
            ast.literal_eval(key): value for key, value in zip(metadata.keys, metadata.values, strict=True) if key
        }
        default = given.get("default", given.get("default_factory"))
        assert default is not None
        return ast.unparse(default), text_in(entries["help"])
    return None


def text_in(node: ast.expr) -> str:
    """A text in the source; what is filled in when it is imported stays as its name."""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(p.value) if isinstance(p, ast.Constant) else "..." for p in node.values)
    return str(ast.literal_eval(node))


def text_of(base: griffe.Class, member: Any, name: str) -> str:
    """Text of a field that `with_default(kind, name, default)` takes from another dataclass."""
    call = call_of(member)
    assert call is not None
    kind = base.module.members[ast.unparse(call.args[0])]
    for owner in [kind.final_target if kind.is_alias else kind]:
        for source in [owner, *owner.mro()]:
            declared = declaration(source.members[name]) if name in source.members else None
            if declared is not None and declared[1]:
                return declared[1]
    raise UnresolvedReference(f"{base.path}.{name} has no text")


def with_lists(text: str) -> str:
    """Make a list of an indented block of arguments, which the docstring of a file spares its functions."""

    def bullets(match: re.Match[str]) -> str:
        lines = [line[4:] for line in match["block"].splitlines()]
        if not NAMED.match(lines[0]):
            return match.group()
        items = [line if line.startswith(" ") else "- " + NAMED.sub(r"`\1`: ", line) for line in lines]
        return "\n" + "\n".join(items) + "\n"

    return INDENTED.sub(bullets, text)
