"""Rewrites what README.md generates: the mechanism table and the speed table (`make readme`)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from regard.catalogue import Card, Paper, card, mechanisms

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"

MECHANISM_COLUMNS = ("key", "what it does", "paper", "input", "patterns", "decoding state", "time")
SPEED_COLUMNS = ("case", "against", "ratio", "target", "reached", "regard", "the other", "detail")


def main() -> None:
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")


def filled(readme: str, results: Path = RESULTS) -> str:
    """`readme` with both generated parts as the registry and the result files have them."""
    return between(between(readme, "mechanisms", mechanism_table()), "speed", speed_tables(results))


def mechanism_table() -> str:
    """One row per mechanism that comes with regard, whatever else is installed and registered."""
    cards = [card(key) for key in mechanisms()]
    return table(MECHANISM_COLUMNS, [_mechanism(own) for own in cards if own.cls.__module__.startswith("regard.")])


def speed_tables(results: Path) -> str:
    """One table per result file, in the order of their names, under the machine that it was measured on."""
    files = sorted(results.glob("*.json"))
    if not files:
        return "No results yet: `make bench` measures."
    return "\n\n".join(_speed_table(file.stem, json.loads(file.read_text(encoding="utf-8"))) for file in files)


def between(text: str, name: str, content: str, page: str = "README.md") -> str:
    """`text` with new content between two marks."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"{page}: {begin} … {end} is missing; write it where the table belongs")
    return f"{before}{begin}\n{content}\n{end}{after}"


def _mechanism(entry: Card) -> tuple[str, ...]:
    contract = entry.contract
    return (
        f"`{entry.key}`",
        entry.summary,
        "; ".join(map(_cited, entry.papers)),
        contract.input,
        ", ".join(contract.patterns),
        contract.state or "",
        f"`{contract.time}`",
    )


def _cited(source: Paper) -> str:
    linked = f"[{source.arxiv}]({source.url})" if source.url else source.title
    return f"{source.year}, {linked}" if source.year else linked


def _speed_table(name: str, result: dict) -> str:
    machine = result["machine"]
    heading = (
        f"`benchmarks/{name}.py` ({machine['processor']}, {machine['threads']} threads, "
        f"{machine['gemm_gflops']} GFLOP/s in a matrix product, torch {machine['torch']}):"
    )
    return f"{heading}\n\n{table(SPEED_COLUMNS, map(_measured, result['rows']))}"


def _measured(row: dict) -> tuple[str, ...]:
    return (
        row["case"],
        row["peer"],
        f"{row['ratio']:.2f}",
        row["target"],
        "yes" if row["reached"] else "no",
        f"{row['ours_seconds'] * 1e3:.1f} ms",
        f"{row['peer_seconds'] * 1e3:.1f} ms",
        ", ".join(f"{key} {_number(value)}" for key, value in row["detail"].items()),
    )


def _number(value: float | str) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(map(_line, [columns, ["---"] * len(columns), *rows]))


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


if __name__ == "__main__":
    main()
