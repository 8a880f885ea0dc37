"""What MkDocs needs to know of regard: a hook that makes the mechanisms' table and pages from the registry, and an
extension by which the reference reads our docstrings."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from importlib import import_module

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from regard.catalogue import Card, Contract, Paper, Taxonomy, card, mechanisms
from regard.testing import Case, cases

INDEX = "mechanisms/index.md"
INDEX_COLUMNS = ("key", "what it does", "patterns", "decoding state", "time", "papers")
LAYOUTS = {"tokens": "batch, length, dim", "grid": "batch, *grid, dim", "feature_map": "batch, dim, height, width"}
METHODS = ["forward", "attention_map", "init_state", "step"]
BATCH = 2
WIDE = "---\nhide: [toc]\n---"
"""The list of headings at the side would take the width that equations and tables need."""


class Docstrings(griffe.Extension):
    """Google's style, for Griffe, where ours is its own: "Fields:", and "query, key, value: …" of several arguments."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring:
            text = obj.docstring.value.replace("\nFields:\n", "\nArgs:\n")
            # What follows a space would be taken for the type.
            obj.docstring.value = re.sub(r"^    \w+(, \w+)+: ", _joined, text, flags=re.MULTILINE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the mechanisms into the menu, by room."""
    menu = next(part for entry in config.nav or [] for part in entry.values() if INDEX in part)
    menu += [{_title(room): [{entry.key: page_of(entry)} for entry in cards]} for room, cards in rooms().items()]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages to those of docs/."""
    for path, content in pages().items():
        files.append(File.generated(config, path, content=content))
    return files


def rooms() -> dict[str, list[Card]]:
    """The mechanisms that come with regard, whatever else is registered, by the package they stand in."""
    found: dict[str, list[Card]] = {}
    for entry in map(card, mechanisms()):
        if entry.cls.__module__.startswith("regard."):
            found.setdefault(entry.cls.__module__.rpartition(".")[0], []).append(entry)
    return dict(sorted(found.items()))


def pages() -> dict[str, str]:
    """Markdown by path: the table, and a page for each mechanism."""
    cards = [entry for room in rooms().values() for entry in room]
    return {INDEX: index(), **{page_of(entry): page(entry) for entry in cards}}


def page_of(entry: Card) -> str:
    """Where the page of a mechanism is."""
    return f"mechanisms/{entry.key}.md"


def index() -> str:
    """The table of mechanisms, a part for each room under its docstring."""
    parts = [
        WIDE,
        "# Mechanisms",
        "Time is that of a forward up to a constant factor, in `n` queries, `m` keys, width `d`, `h` heads and the "
        "arguments named. The decoding state is what a causal mechanism carries from token to token, and how it grows "
        "with the tokens seen.",
    ]
    for room, cards in rooms().items():
        parts += [f"## {_title(room)}", prose(inspect.getdoc(import_module(room)) or "")]
        parts.append(_table(INDEX_COLUMNS, map(_index_row, cards)))
    return "\n\n".join(parts)


def page(entry: Card) -> str:
    """All that is known of one mechanism."""
    contract = [
        (f"`{item.name}`", _words(getattr(entry.contract, item.name)))
        for item in fields(Contract)
        if item.name != "options"
    ]
    options = [(_words(option.arguments), _words(option.changes)) for option in entry.contract.options]
    parts = [
        WIDE,
        f"# {entry.key}",
        prose(entry.summary),
        "\n".join(f"- {_cited(source)}" for source in entry.papers),
        "## Use",
        f"```python\n{use(entry)}```",
        "## What it computes",
        prose(entry.description),
        "## Arguments",
        f"::: {entry.cls.__module__}.{entry.cls.__qualname__}\n"
        f"    options:\n      heading_level: 3\n      members: {METHODS}\n      show_root_full_path: false",
        "## Contract",
        "What it promises, as [`Contract`](../catalogue.md#regard.catalogue.contract.Contract) declares it and "
        "[the conformance suite](../testing.md) proves it.",
        _table(("declares", "value"), contract),
    ]
    if options:
        parts += [
            "Proved with the default arguments, and with these:",
            _table(("arguments", "what changes in the contract"), options),
        ]
    kind = [(f"`{item.name}`", _words(getattr(entry.taxonomy, item.name))) for item in fields(Taxonomy)]
    parts += [
        "## Taxonomy",
        "What kind of attention it is, as [`Taxonomy`](../catalogue.md#regard.catalogue.taxonomy.Taxonomy) explains.",
        _table(("of", "kind"), kind),
    ]
    return "\n\n".join(parts)


def use(entry: Card) -> str:
    """Lines that build the mechanism at a size it is proved at, call it, and do what else it declares."""
    contract = entry.contract
    case = _shown(entry)
    arguments = ", ".join([f'"{entry.key}"', *(f"{name}={value!r}" for name, value in _arguments(case).items())])
    names = ["x", "context"] if case.cross else ["x"]
    drawn = [
        f"{name} = torch.randn{tuple(tensor.shape)}"
        for name, tensor in zip(names, case.inputs(batch=BATCH).tensors(), strict=True)
    ]
    drawn[0] += f"  # {LAYOUTS[contract.input]}"
    given = ", ".join(names)
    lines = [
        "import torch",
        "import regard",
        "",
        f"layer = regard.create({arguments})",
        *drawn,
        f"y = layer({given})  # the shape of x",
    ]
    if contract.attention_map:
        lines.append(f"weights, value = layer.attention_map({given})  # layer.combine(weights @ value) is y")
    if contract.step:
        lines.append(f"first, state = layer.step(x[:, :1], layer.init_state({BATCH}))  # first is y[:, :1]")
    return "\n".join(lines) + "\n"


def prose(docstring: str) -> str:
    """A docstring as Markdown: indented blocks and code stand as they are, other signs mean themselves."""
    paragraphs = docstring.split("\n\n")
    return "\n\n".join(part if part.startswith("    ") else _escaped(part) for part in paragraphs)


def _joined(names: re.Match[str]) -> str:
    return "    " + names[0].strip().replace(" ", "\N{NO-BREAK SPACE}") + " "


def _shown(entry: Card) -> Case:
    """The default case that shows most: the one that decodes, where there is one."""
    pattern = "causal self" if entry.contract.step else next(iter(entry.contract.patterns), None)
    return next(case for case in cases(entry) if not case.option_set.arguments and case.pattern == pattern)


def _arguments(case: Case) -> dict[str, object]:
    causal = inspect.signature(case.card.cls).parameters.get("causal")
    if case.pattern is None or causal is None or causal.default == case.causal:
        return case.arguments
    return {**case.arguments, "causal": case.causal}


def _index_row(entry: Card) -> tuple[str, ...]:
    contract = entry.contract
    return (
        f"[{entry.key}]({entry.key}.md)",
        prose(entry.summary),
        ", ".join(contract.patterns),
        contract.state or "",
        f"`{contract.time}`",
        "; ".join(_linked(source, source.arxiv or source.title) for source in entry.papers),
    )


def _cited(source: Paper) -> str:
    return ", ".join(filter(None, (_linked(source, source.title), str(source.year or ""))))


def _linked(source: Paper, text: str) -> str:
    return f"[{_escaped(text)}]({source.url})" if source.url else _escaped(text)


def _title(room: str) -> str:
    return room.rpartition(".")[2].replace("_", " ").capitalize()


def _words(value: object) -> str:
    """A declared value in words."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"`{name}={item!r}`" for name, item in value.items()) or "nothing"
    if isinstance(value, tuple):
        return ", ".join(map(_words, value)) or "none"
    return "none" if value is None else f"`{str(value).removeprefix('torch.')}`"


def _escaped(text: str) -> str:
    code_or_not = re.split(r"(``.+?``|`.+?`)", text, flags=re.DOTALL)
    return "".join(
        part if part.startswith("`") else re.sub(r"[\\*_\[\]]", r"\\\g<0>", part).replace("<", "&lt;")
        for part in code_or_not
    )


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(
        "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"
        for cells in [columns, ["---"] * len(columns), *rows]
    )
