"""The papers table: what the library was founded on, what must work of each paper, and where it does."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from types import MappingProxyType

from regard.ops.checks import one_of, require

COLUMNS = ("id", "key", "title", "year", "arxiv", "wave", "room", "symbol", "what", "implemented_by")


@dataclass(frozen=True)
class Paper:
    """One paper: a row of the table, or the source of a mechanism that comes from elsewhere.

    `year` is that of the first publication and `arxiv` the identifier without its version; either is None
    where it is not known for certain. `id`, `wave`, `room`, `symbol` and `what` (what must work) place a row
    in the table. `implemented_by` holds import paths written `module:Symbol`.
    """

    key: str
    title: str
    year: int | None
    arxiv: str | None
    id: int | None = None
    wave: int | None = None
    room: str = ""
    symbol: str = ""
    what: str = ""
    implemented_by: tuple[str, ...] = ()

    @property
    def implemented(self) -> bool:
        """Whether anything in the library implements this paper."""
        return bool(self.implemented_by)

    @property
    def url(self) -> str | None:
        """The abstract page, or None without an arXiv identifier."""
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else None

    def cite(self) -> str:
        """Title, year and arXiv identifier in one line, leaving out what is unknown."""
        dated = f"{self.title} ({self.year})" if self.year else self.title
        return f"{dated}, arXiv {self.arxiv}" if self.arxiv else dated


@cache
def papers() -> Mapping[str, Paper]:
    """The whole table, read-only, from key to `Paper` in the order of `id`."""
    table = resources.files("regard.catalogue").joinpath("papers.psv")
    return MappingProxyType(read_table(table.read_text(encoding="utf-8").splitlines()))


def paper(key: str) -> Paper:
    """The paper called `key`; raises ``ValueError`` naming the nearest key if there is none."""
    one_of("paper", "key", key, papers())
    return papers()[key]


def read_table(lines: Iterable[str]) -> dict[str, Paper]:
    """Parse pipe-separated `lines`, the header `COLUMNS` first; a malformed row raises ``ValueError``.

    Titles may hold quotation marks but no pipe: fields are never quoted.
    """
    table: dict[str, Paper] = {}
    rows = csv.reader(lines, delimiter="|", quoting=csv.QUOTE_NONE)
    for number, row in enumerate(rows, start=1):
        owner = f"papers.psv, line {number}"
        if number == 1:
            require(tuple(row) == COLUMNS, owner, f"header {row} is not known", f"write {'|'.join(COLUMNS)}")
            continue
        entry = _paper(owner, row)
        require(entry.key not in table, owner, f"key {entry.key!r} stands twice", "give each paper its own key")
        table[entry.key] = entry
    return table


def _paper(owner: str, row: list[str]) -> Paper:
    expected = f"write {'|'.join(COLUMNS)}"
    require(len(row) == len(COLUMNS), owner, f"{len(row)} fields are not {len(COLUMNS)}", expected)
    field = dict(zip(COLUMNS, row, strict=True))
    for name in ("id", "key", "title", "wave"):
        require(bool(field[name]), owner, f"{name} is empty", "only year, arxiv and implemented_by may be unknown")
    return Paper(
        key=field["key"],
        title=field["title"],
        year=_integer(owner, "year", field["year"]),
        arxiv=field["arxiv"] or None,
        id=_integer(owner, "id", field["id"]),
        wave=_integer(owner, "wave", field["wave"]),
        room=field["room"],
        symbol=field["symbol"],
        what=field["what"],
        implemented_by=tuple(path.strip() for path in field["implemented_by"].split(",") if path.strip()),
    )


def _integer(owner: str, name: str, text: str) -> int | None:
    require(not text or text.isdecimal(), owner, f"{name} {text!r} is not a number", "write digits or nothing")
    return int(text) if text else None
