"""``regard list`` and ``regard show``: what the catalogue says, printed."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from itertools import groupby
from typing import Annotated, get_args

import typer
from rich.console import Console

from regard.catalogue import Card, Contract, Facet, Paper, Pattern, Taxonomy, card, mechanisms, paper, papers
from regard.catalogue.contract import Input
from regard.cli.app import app, fail, open_console, print_rows

MECHANISM_COLUMNS = ("key", "summary", "input", "patterns", "state", "map", "source")
PAPER_COLUMNS = ("key", "what must work", "wave", "room", "source")
SOURCE_FIELDS = ("key", "title", "year", "arxiv")


@app.command("list")
def list_(
    implemented: Annotated[
        bool | None, typer.Option("--implemented/--open", help="Only what works, or only what does not yet.")
    ] = None,
    wave: Annotated[int | None, typer.Option(help="Only papers of this wave of work.")] = None,
    room: Annotated[str | None, typer.Option(help="Only papers of this part of the library, e.g. nn/heads.")] = None,
    pattern: Annotated[str | None, typer.Option(help="Only mechanisms that attend so, e.g. 'causal self'.")] = None,
    input_: Annotated[str | None, typer.Option("--input", help="Only mechanisms that take this, e.g. tokens.")] = None,
    facet: Annotated[str | None, typer.Option(help="Only mechanisms of this kind in the taxonomy, e.g. local.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List the mechanisms, then the other papers: those implemented, and those open, by wave.

    Where the output is not a terminal, prints one line per entry, its fields separated by tabs. A mechanism has the
    fields "mechanism", key, summary, input, patterns, growth of the decoding state, attention map, source; a paper has
    "implemented" or "open", key, what must work, wave, room, source. A field that says nothing is "-".
    """
    _check("--wave", wave, sorted({row.wave for row in papers().values() if row.wave is not None}))
    _check("--room", room, sorted({row.room for row in papers().values()}))
    _check("--pattern", pattern, get_args(Pattern))
    _check("--input", input_, get_args(Input))
    _check("--facet", facet, get_args(Facet))
    filters = {"pattern": pattern, "input": input_, "facet": facet}
    declared = {name: value for name, value in filters.items() if value is not None}
    if declared and implemented is False:
        fail("--open with --pattern, --input or --facet finds nothing: only an implemented mechanism declares them")
    wanted = [row for row in papers().values() if wave in (None, row.wave) and room in (None, row.room)]
    rows = [] if declared else [row for row in wanted if implemented in (None, row.implemented)]
    cards = [] if implemented is False else [card(key) for key in mechanisms(**declared)]  # pyright: ignore[reportArgumentType] checked above
    if wave is not None or room is not None:
        cards = [entry for entry in cards if not set(wanted).isdisjoint(entry.papers)]
    if as_json:
        typer.echo(json.dumps({"mechanisms": [*map(_card_record, cards)], "papers": [*map(_paper_record, rows)]}))
    else:
        _print_list(open_console(), cards, rows)


@app.command()
def show(key: Annotated[str, typer.Argument(help="A mechanism, or a paper of the table.")]) -> None:
    """Show a mechanism: source, equation, cost, contract, kind, arguments. Or a paper: what must work, and where."""
    console = open_console()
    if key in mechanisms():
        _show_card(console, card(key))
    elif key in papers():
        _show_paper(console, paper(key))
    else:
        near = get_close_matches(key, sorted({*mechanisms(), *papers()}))
        fail(f"{key!r} is not known; " + (f"did you mean {' or '.join(near)}?" if near else "see `regard list`"))


def _check(option: str, value: object, valid: Sequence[object]) -> None:
    if value is not None and value not in valid:
        fail(f"{option} {value!r} is not known; valid values: {', '.join(map(str, valid))}")


def _print_list(console: Console, cards: Sequence[Card], rows: Sequence[Paper]) -> None:
    shown = {source.key for entry in cards for source in entry.papers}
    done = [row for row in rows if row.implemented and row.key not in shown]
    waiting = sorted((row for row in rows if not row.implemented), key=lambda row: row.wave or 0)
    print_rows(console, "mechanism", "Mechanisms", MECHANISM_COLUMNS, map(_card_fields, cards))
    print_rows(console, "implemented", "Implemented beside them", PAPER_COLUMNS, map(_paper_fields, done))
    for number, group in groupby(waiting, key=lambda row: row.wave):
        print_rows(console, "open", f"Open, wave {number}", PAPER_COLUMNS, map(_paper_fields, group))
    if console.is_terminal:
        console.print(f"{len(cards)} mechanisms, {len(done)} papers implemented beside them, {len(waiting)} open")


def _show_card(console: Console, entry: Card) -> None:
    module = f"{entry.cls.__module__}.{entry.cls.__name__}"
    sources = [line for source in entry.papers for line in (source.cite(), source.url) if line]
    _print_text(console, f"{entry.key}: {entry.summary}", module, *sources, "", entry.description, "")
    contract = [
        (item.name, _say(getattr(entry.contract, item.name))) for item in fields(Contract) if item.name != "options"
    ]
    print_rows(console, "", "Contract", ("declares", "value"), contract)
    _print_text(console, "")
    answers = [(item.name, _say(getattr(entry.taxonomy, item.name))) for item in fields(Taxonomy)]
    print_rows(console, "", "Taxonomy", ("of", "kind"), answers)
    _print_text(console, "")
    arguments = [
        (name, "required" if item.default is item.empty else repr(item.default), _type(item.annotation))
        for name, item in inspect.signature(entry.cls).parameters.items()
    ]
    print_rows(console, "", "Arguments", ("argument", "default", "type"), arguments)
    _print_text(console, "")
    options = [(str(option), _say(option.changes)) for option in entry.option_sets()]
    print_rows(console, "", "Proved with", ("option set", "which changes"), options)


def _show_paper(console: Console, row: Paper) -> None:
    known_as = ", ".join(key for key in mechanisms() if row in card(key).papers)
    _print_text(console, f"{row.key}: {row.cite()}")
    print_rows(
        console,
        "",
        "In the papers table",
        ("field", "value"),
        [
            ("state", "implemented" if row.implemented else "open"),
            ("link", row.url or "-"),
            ("what must work", row.what or "-"),
            ("wave", str(row.wave)),
            ("room", row.room),
            ("name", row.symbol or "-"),
            ("implemented by", ", ".join(row.implemented_by) or "-"),
            ("mechanism", known_as or "-"),
        ],
    )


def _print_text(console: Console, *lines: str) -> None:
    for line in lines:
        console.print(line, soft_wrap=True)


def _short_source(source: Paper) -> str:
    return " ".join(filter(None, (str(source.year or ""), f"arXiv {source.arxiv}" if source.arxiv else "")))


def _card_fields(entry: Card) -> tuple[str, ...]:
    contract = entry.contract
    return (
        entry.key,
        entry.summary,
        contract.input,
        _say(contract.patterns),
        contract.state or "-",
        "map" if contract.attention_map else "-",
        "; ".join(map(_short_source, entry.papers)),
    )


def _paper_fields(row: Paper) -> tuple[str, ...]:
    return row.key, row.what or row.title, str(row.wave), row.room, _short_source(row) or "-"


def _card_record(entry: Card) -> dict[str, object]:
    contract = entry.contract
    return {
        "key": entry.key,
        "summary": entry.summary,
        "input": contract.input,
        "patterns": contract.patterns,
        "state": contract.state,
        "attention_map": contract.attention_map,
        "taxonomy": entry.taxonomy.facets,
        "time": contract.time,
        "memory": contract.memory,
        "class": f"{entry.cls.__module__}:{entry.cls.__name__}",
        "papers": [{name: getattr(source, name) for name in SOURCE_FIELDS} for source in entry.papers],
    }


def _paper_record(row: Paper) -> dict[str, object]:
    return {name: getattr(row, name) for name in (*SOURCE_FIELDS, "wave", "room", "what", "implemented_by")}


def _type(annotation: object) -> str:
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def _say(value: object) -> str:
    """A contract's value in words."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={_say(item)}" for name, item in value.items()) or "-"
    if isinstance(value, tuple):
        return ", ".join(map(_say, value)) or "-"
    return "-" if value is None else str(value).removeprefix("torch.")
