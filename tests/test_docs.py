"""The documentation site is true and whole: it builds, its code runs, and it has a page for every mechanism."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import pytest
import torch

import regard
from regard import catalogue, nn, ops, testing
from regard.catalogue import Card
from tests.snippets import assert_runs, python_blocks
from tools.docs import INDEX, page_of, pages, prose, rooms, use

ROOT = Path(__file__).parent.parent
BLOCKS = python_blocks(sorted((ROOT / "docs").rglob("*.md")))
CARDS = [entry for cards in rooms().values() for entry in cards]
ELSEWHERE = re.compile(r"(https?:)?//")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stdout + built.stderr
    return folder


class Loaded(HTMLParser):
    """Addresses that a page loads by itself: all but those of links to follow."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = ("src", "srcset", "href", "data", "poster")
        self.addresses += [value for name, value in attrs if tag != "a" and name in names and value]


@pytest.mark.parametrize("code", BLOCKS.values(), ids=BLOCKS)
def test_python_block_runs(code: str, tmp_path: Path):
    assert_runs(code, tmp_path)


@pytest.mark.parametrize("entry", CARDS, ids=lambda entry: entry.key)
def test_lines_of_use_do_what_their_comments_say(entry: Card):
    lines = use(entry)
    assert len(list(filter(None, lines.splitlines()))) <= 8
    found: dict[str, torch.Tensor] = {}
    exec(lines, found)
    assert found["y"].shape == found["x"].shape
    if entry.contract.attention_map:
        mixed = found["layer"].combine(found["weights"] @ found["value"])
        torch.testing.assert_close(mixed, found["y"], atol=1e-4, rtol=1e-4)
    if entry.contract.step:
        torch.testing.assert_close(found["first"], found["y"][:, :1], atol=1e-4, rtol=1e-4)


def test_every_mechanism_of_the_library_has_a_page():
    assert {entry.cls for entry in CARDS} == {getattr(nn, name) for name in nn.__all__} - {nn.Mechanism}
    assert set(pages()) == {INDEX, *map(page_of, CARDS)}


@pytest.mark.parametrize("entry", CARDS, ids=lambda entry: entry.key)
def test_table_and_page_name_every_paper(entry: Card):
    page, table = pages()[page_of(entry)], pages()[INDEX]
    assert f"[{entry.key}]({entry.key}.md)" in table
    for source in entry.papers:
        assert (source.url or source.title) in page
        assert (source.url or source.title) in table


def test_docstrings_show_their_signs_as_they_stand():
    assert prose("x_i [1] a*b*c <d> `*e*`\n\n    f*g*h") == "x\\_i \\[1\\] a\\*b\\*c &lt;d> `*e*`\n\n    f*g*h"


def test_menu_holds_every_mechanism(site: Path):
    page = (site / "mechanisms" / "index.html").read_text(encoding="utf-8")
    menu = page[page.index("<nav") : page.index("<article")]
    assert not [room for room in rooms() if room.rpartition(".")[2].capitalize() not in menu]
    assert not [entry.key for entry in CARDS if not (site / "mechanisms" / f"{entry.key}.html").exists()]


def test_pages_load_nothing_from_elsewhere(site: Path):
    loaded = {page: Loaded(page.read_text(encoding="utf-8")).addresses for page in site.rglob("*.html")}
    assert all(loaded.values())
    assert not [address for addresses in loaded.values() for address in addresses if ELSEWHERE.match(address)]
    styles = "".join(file.read_text(encoding="utf-8") for file in [*site.rglob("*.css"), *loaded])
    assert not re.search(r"""(url\(|@import)\s*["']?(https?:)?//""", styles)


@pytest.mark.parametrize(
    ("module", "page"),
    [(ops, "ops"), (ops.masks, "masks"), (catalogue, "catalogue"), (testing, "testing")],
    ids=lambda part: part if isinstance(part, str) else part.__name__,
)
def test_every_public_function_and_class_is_in_the_reference(site: Path, module: ModuleType, page: str):
    text = (site / f"{page}.html").read_text(encoding="utf-8")
    anchors = set(re.findall(r'id="([\w.]+)"', text))
    public = {f"{module.__name__}.{name}": getattr(module, name) for name in module.__all__}
    for path, thing in public.items():
        if inspect.isclass(thing) or inspect.isfunction(thing):
            assert {path, f"{thing.__module__}.{thing.__name__}"} & anchors, path


def test_reference_reads_several_arguments_in_one_line_and_fields(site: Path):
    assert "query,\N{NO-BREAK SPACE}key,\N{NO-BREAK SPACE}value" in (site / "ops.html").read_text(encoding="utf-8")
    assert "Fields" not in (site / "catalogue.html").read_text(encoding="utf-8")


def test_architecture_names_every_floor():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    places = {file.stem for file in Path(regard.__file__).parent.iterdir()} - {"__init__", "__pycache__"}
    assert not {place for place in places if f"| `{place}` |" not in text}
