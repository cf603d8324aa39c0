"""Writes docs/api.md, the reference of the public Python API, from the signatures and docstrings of the source.

    python docs/generate_api.py            write the page
    python docs/generate_api.py --check    exit with 1 where the committed page is out of date

The source is read, not imported (griffe, extra `docs`), so no engine needs to be installed. A warning about a docstring
is an error: a parameter that is documented must exist.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import griffe

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "api.md"
# What users and contributors may rely on, by heading: a module, and the names to list, all its public ones where none
# are given.
SECTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "Generate": {
        "chunkkv.session": ("ChunkKVSession",),
        "chunkkv.sampling": ("SamplingParams",),
        "chunkkv.results": (),
    },
    "Ask many questions about one prompt": {
        "chunkkv.contexts.context": ("Context", "longest_prefix"),
        "chunkkv.contexts.make": ("context_of_row",),
        "chunkkv.contexts.continuation": (),
        "chunkkv.contexts.scorers": ("Scorer", "with_scorer"),
        "chunkkv.conversation": (),
    },
    "Settings": {"chunkkv.settings": ()},
    "Errors": {"chunkkv.errors": ()},
    "Serve many requests": {"chunkkv.batching": ()},
    "The op on your arrays": {"chunkkv.native": ()},
    "The op in NumPy": {
        "chunkkv.reference_scores": (),
        "chunkkv.reference": (),
        "chunkkv.reference_layers": (),
    },
    "The contract of an engine": {"chunkkv.executors.interface": (), "chunkkv.executors.load": ()},
    "Build engines": {
        "chunkkv_builder.build": ("build_engine",),
        "chunkkv_builder.backends.interface": (),
        "chunkkv_builder.checkpoint.interface": (),
        "chunkkv_builder.backends.tensorrt_llm.engine_build": ("build_chunkkv",),
    },
}
HEAD = """# Python API

`make docs` writes this page from the docstrings; do not edit it by hand. Shapes are in brackets, with the letters of
[method.md](method.md#symbols). `import chunkkv` offers these names directly:
{names}.
"""
WIDTH = 120


class DocstringWarnings(logging.Handler):
    """Collects what griffe says about docstrings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a message."""
        self.messages.append(record.getMessage())


def load() -> griffe.ModulesCollection:
    """Return both packages, read from this checkout."""
    loader = griffe.GriffeLoader(
        search_paths=[ROOT / "python", ROOT / "builder"], docstring_parser="numpy", allow_inspection=False
    )
    for package in ("chunkkv", "chunkkv_builder"):
        loader.load(package)
    loader.resolve_aliases(external=False)
    return loader.modules_collection


def page(modules: griffe.ModulesCollection) -> str:
    """Return the whole page; raises SystemExit for a name in SECTIONS that the source does not have."""
    exported = ", ".join(f"`{name}`" for name in modules["chunkkv"].exports or ())
    contents: list[str] = []
    lines: list[str] = []
    for heading, entries in SECTIONS.items():
        lines.append(f"\n## {heading}\n")
        titles: list[str] = []
        for path, names in entries.items():
            module = modules[path]
            members = {member.name: member for member in _public(module)}
            if missing := [name for name in names if name not in members]:
                sys.exit(f"{path} has no public, documented {', '.join(missing)}: correct SECTIONS")
            lines.append(f"\n`{path}`: {_text(module)}\n")
            for name in names or members:
                titles.append(f"`{name}`")
                lines += _member(members[name], "###")
        contents.append(f"- [{heading}](#{heading.lower().replace(' ', '-')}): {', '.join(titles)}")
    text = "\n".join([HEAD.format(names=exported), *contents, *lines])
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def _public(scope: griffe.Module | griffe.Class) -> list[griffe.Class | griffe.Function]:
    """Return the documented classes and functions that a scope defines or lists in __all__, in source order."""
    documented: list[griffe.Class | griffe.Function] = []
    for name, member in scope.members.items():
        target = member.final_target if isinstance(member, griffe.Alias) and name in (scope.exports or ()) else member
        if isinstance(target, (griffe.Class, griffe.Function)) and not name.startswith("_") and target.docstring:
            documented.append(target)
    return documented


def _member(member: griffe.Class | griffe.Function, level: str) -> Iterator[str]:
    owner = member.parent
    title = f"{owner.name}.{member.name}" if isinstance(owner, griffe.Class) else member.name
    yield f"\n{level} `{title}`\n"
    yield f"```python\n{_signature(member)}\n```\n"
    yield from _docstring(member)
    if isinstance(member, griffe.Class):
        values = [attribute for attribute in member.attributes.values() if _is_property(attribute)]
        if values:
            yield "**Properties**\n"
        for value in values:
            yield f"- `{value.name}` ({value.annotation}): {' '.join(_text(value).split())}"
        if values:
            yield ""
        for method in _public(member):
            yield from _member(method, "####")


def _is_property(attribute: griffe.Attribute) -> bool:
    return "property" in attribute.labels and not attribute.name.startswith("_") and bool(attribute.docstring)


def _signature(member: griffe.Class | griffe.Function) -> str:
    if isinstance(member, griffe.Function):
        return "\n".join(_function(each) for each in (member.overloads or [member]))
    bases = ", ".join(str(base) for base in member.bases)
    name = f"class {member.name}" + (f"({bases})" if bases else "")
    constructor = member.members.get("__init__")
    if "dataclass" in member.labels or bases.startswith(("NamedTuple", "Protocol")):
        fields = [f"    {field.name}{_type(field.annotation)}{_default(field.value)}" for field in _fields(member)]
        return "\n".join([f"{name}:", *fields]) if fields else name
    if isinstance(constructor, griffe.Function):
        return f"{name}:\n    def {_wrapped('__init__', _parameters(constructor), '', indent=4)}"
    return name


def _function(function: griffe.Function) -> str:
    kind = "".join(f"@{label}\n" for label in ("classmethod", "staticmethod") if label in function.labels)
    return f"{kind}def {_wrapped(function.name, _parameters(function), _returns(function))}"


def _fields(member: griffe.Class) -> list[griffe.Attribute]:
    return [
        attribute
        for attribute in member.attributes.values()
        if attribute.annotation is not None
        and not attribute.name.startswith("_")
        and "property" not in attribute.labels
    ]


def _type(annotation: griffe.Expr | str | None) -> str:
    return "" if annotation is None else f": {annotation}"


def _default(value: griffe.Expr | str | None) -> str:
    return "" if value is None else f" = {value}"


def _returns(member: griffe.Function) -> str:
    return "" if member.returns is None else f" -> {member.returns}"


def _parameters(member: griffe.Function) -> list[str]:
    """Return the parameters as they are written, with the marks for positional-only and keyword-only ones."""
    written: list[str] = []
    kinds = griffe.ParameterKind
    for parameter in member.parameters:
        if parameter.name in ("self", "cls") and not written:
            continue
        prefix = {kinds.var_positional: "*", kinds.var_keyword: "**"}.get(parameter.kind, "")
        if parameter.kind is kinds.keyword_only and not any(text.startswith("*") for text in written):
            written.append("*")
        default = "" if prefix or parameter.default is None else f" = {parameter.default}"
        written.append(f"{prefix}{parameter.name}{_type(parameter.annotation)}{default}")
    return written


def _wrapped(name: str, parameters: list[str], returns: str, indent: int = 0) -> str:
    line = f"{name}({', '.join(parameters)}){returns}"
    if len(line) + indent + 4 <= WIDTH:
        return line
    space = " " * (indent + 4)
    return "\n".join([f"{name}(", *(f"{space}{text}," for text in parameters), f"{' ' * indent}){returns}"])


def _docstring(member: griffe.Class | griffe.Function) -> Iterator[str]:
    """Yield a docstring's prose, and its sections as lists."""
    if member.docstring is None:
        return
    for section in member.docstring.parsed:
        if section.kind is griffe.DocstringSectionKind.text:
            yield f"{section.value}\n"
            continue
        if isinstance(section.value, list):
            yield f"**{section.title or section.kind.value.replace('_', ' ').capitalize()}**\n"
            yield from (_item(item, _written_default(member, getattr(item, "name", ""))) for item in section.value)
            yield ""


def _written_default(member: griffe.Class | griffe.Function, name: str) -> str | None:
    """Return the default of a field or parameter as the code has it; a docstring could only repeat it."""
    if isinstance(member, griffe.Function):
        value = member.parameters[name].default if name in member.parameters else None
    else:
        field = member.members.get(name)
        value = field.value if isinstance(field, griffe.Attribute) else None
    return None if value is None else str(value)


def _item(item: griffe.DocstringElement, default: str | None) -> str:
    """Return a documented parameter, returned value or error as one line of a list."""
    kind = "" if item.annotation is None else str(item.annotation)
    if choices := re.fullmatch(r"\((.+)\)", kind):
        kind = " or ".join(f"`{choice.strip()}`" for choice in choices[1].split(","))
    notes = ", ".join([*([kind] if kind else []), *([f"default `{default}`"] if default is not None else [])])
    text = " ".join(item.description.split())
    name = getattr(item, "name", "")
    return f"- `{name}` ({notes}): {text}" if name and notes else f"- `{name or kind}`: {text}"


def _text(member: griffe.Object) -> str:
    return "" if member.docstring is None else member.docstring.value.strip()


def main() -> None:
    """Write or check the page; exits with 1 for warnings, or where the committed page is out of date."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    warnings = DocstringWarnings()
    logging.getLogger("griffe").addHandler(warnings)
    text = page(load())
    if warnings.messages:
        sys.exit("\n".join(["docstrings have warnings:", *warnings.messages]))
    if arguments.check and text != PAGE.read_text(encoding="utf-8"):
        sys.exit("docs/api.md is out of date: run make docs")
    if not arguments.check:
        PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
