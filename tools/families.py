"""Rewrites the table of docs/families.md, once all that it says is found true: `python -m tools.families`."""

from __future__ import annotations

from tests.sites.families import FAMILIES
from tests.sites.properties import PROPERTIES, Running, cells
from tools import readme

PAGE = readme.ROOT / "docs" / "families.md"


def main() -> None:
    for family in FAMILIES.values():
        running = Running(family)
        for holds in PROPERTIES.values():
            holds(running)
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(readme.between(page, "families", table(), PAGE.name), encoding="utf-8")


def table() -> str:
    """What each property is, and a row per family."""
    meaning = "\n".join(f"- **{name}**: {(holds.__doc__ or '').strip()}" for name, holds in PROPERTIES.items())
    rows = [[name, _sites(family.sites), *cells(family)] for name, family in FAMILIES.items()]
    return f"{meaning}\n\n{readme.table(['family', 'sites', *PROPERTIES], rows)}"


def _sites(by_kind: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in by_kind.items())


if __name__ == "__main__":
    main()
