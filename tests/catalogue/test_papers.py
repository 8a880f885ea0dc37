"""The papers table is whole, its identifiers plausible, and what it calls implemented can be imported."""

from __future__ import annotations

import dataclasses
import re
from importlib import import_module

import pytest

from regard.catalogue.papers import COLUMNS, Paper, paper, papers, read_table

HEADER = "|".join(COLUMNS)
NEW_STYLE = re.compile(r"(\d\d)(0[1-9]|1[0-2])\.\d{4,5}")
OLD_STYLE = re.compile(r"[a-z-]+(?:\.[A-Z]{2})?/(\d\d)(0[1-9]|1[0-2])\d{3}")


def row(**changes: str) -> str:
    fields = dict.fromkeys(COLUMNS, "") | {"id": "0", "key": "hilo", "title": "HiLo", "wave": "2"} | changes
    return "|".join(fields.values())


def test_table_has_every_paper_once_in_id_order():
    assert [entry.id for entry in papers().values()] == list(range(331))


def test_keys_are_identifiers_and_find_their_own_paper():
    for key, entry in papers().items():
        assert key == entry.key
        assert key.isidentifier()


def test_titles_are_clean_and_different():
    titles = [entry.title for entry in papers().values()]
    assert all(title and title == " ".join(title.split()) for title in titles)
    assert len({title.casefold() for title in titles}) == len(titles)


def test_every_paper_says_where_it_belongs_and_what_must_work():
    for entry in papers().values():
        assert entry.wave in range(1, 7), entry
        assert entry.room, entry
        assert entry.symbol, entry
        assert entry.what, entry


def test_arxiv_identifiers_are_well_formed_and_agree_with_the_year():
    for entry in papers().values():
        if entry.arxiv is None:
            continue
        match = NEW_STYLE.fullmatch(entry.arxiv) or OLD_STYLE.fullmatch(entry.arxiv)
        assert match, entry
        century = 1900 if int(match[1]) > 90 else 2000
        assert entry.year is not None, entry
        assert abs(century + int(match[1]) - entry.year) <= 1, entry


def test_no_two_papers_share_an_arxiv_identifier():
    known = [entry.arxiv for entry in papers().values() if entry.arxiv]
    assert len(set(known)) == len(known)


def test_implementations_can_be_imported():
    for entry in papers().values():
        for path in entry.implemented_by:
            module, _, symbol = path.partition(":")
            assert hasattr(import_module(module), symbol), f"{entry.key}: {path}"


def test_table_cannot_be_changed():
    with pytest.raises(TypeError):
        papers()["hilo"] = Paper("hilo", "HiLo", None, None)  # pyright: ignore[reportIndexIssue]
    with pytest.raises(dataclasses.FrozenInstanceError):
        paper("hilo").title = "HiLo"  # pyright: ignore[reportAttributeAccessIssue]


def test_paper_finds_by_key():
    assert paper("faster_na").arxiv == "2403.04690"


def test_unknown_key_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"paper: key 'sigmoid_atention' .* did you mean 'sigmoid_attention'"):
        paper("sigmoid_atention")


@pytest.mark.parametrize(
    ("year", "arxiv", "expected"),
    [
        (2017, "1706.03762", "Attention Is All You Need (2017), arXiv 1706.03762"),
        (2017, None, "Attention Is All You Need (2017)"),
        (None, "1706.03762", "Attention Is All You Need, arXiv 1706.03762"),
        (None, None, "Attention Is All You Need"),
    ],
)
def test_citation_leaves_out_what_is_unknown(year: int | None, arxiv: str | None, expected: str):
    assert Paper("multi_head", "Attention Is All You Need", year, arxiv).cite() == expected


def test_url_needs_an_arxiv_identifier():
    assert Paper("a", "A", 2017, "1706.03762").url == "https://arxiv.org/abs/1706.03762"
    assert Paper("a", "A", 2017, None).url is None


def test_implementations_are_split_at_commas():
    entry = read_table([HEADER, row(implemented_by="regard.ops:attention, regard.nn:HiLo")])["hilo"]
    assert entry.implemented
    assert entry.implemented_by == ("regard.ops:attention", "regard.nn:HiLo")


def test_empty_fields_are_unknown():
    entry = read_table([HEADER, row()])["hilo"]
    assert (entry.year, entry.arxiv, entry.implemented_by, entry.implemented) == (None, None, (), False)


def test_quotation_marks_belong_to_the_title():
    assert read_table([HEADER, row(title='"Sorry, Come Again?"')])["hilo"].title == '"Sorry, Come Again?"'


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (row(title="High|Low"), "11 fields are not 10"),
        ("0|hilo", "2 fields are not 10"),
        ("", "0 fields are not 10"),
        (row(id="x"), "id 'x' is not a number"),
        (row(year="20O4"), "year '20O4' is not a number"),
        (row(title=""), "title is empty"),
        (row(key="first"), "key 'first' stands twice"),
    ],
)
def test_malformed_row_names_its_line(bad: str, problem: str):
    with pytest.raises(ValueError, match=f"papers.psv, line 3: {re.escape(problem)}"):
        read_table([HEADER, row(key="first"), bad])


def test_unknown_header_is_refused():
    with pytest.raises(ValueError, match=r"papers.psv, line 1: header"):
        read_table(["id|key|title"])
