"""The report shows what the results say, in a browser too."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from math import isclose
from pathlib import Path
from typing import Any

import pytest
from made_up import results

from regard.bench.results import Results
from regard.report.figures import Figure, figures
from regard.report.page import page

DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
UNITS = (1.0, 100.0, 1e3, 1e6, 1e-3, 1e-6, 1e-9)
"""What a number may be multiplied by where it is shown: %, ms, µs, kB, MB, GB and GFLOP/s."""


def resolved(content: Any, pointer: str) -> Any:
    for key in pointer.split("/")[1:]:
        content = content[key]
    return content


def traces(figure: Figure) -> list[dict[str, Any]]:
    """What is drawn of mechanisms."""
    return [trace for trace in json.loads(figure.json)["data"] if "customdata" in trace]


@pytest.fixture(scope="module")
def measured() -> Results:
    scores = {"multi_head": 0.97, "window:window=64": 0.95, "lightning": 0.7, "gqa": 0.9}
    samples = {name: [[score - 0.02, score, score + 0.02] * 9] * 3 for name, score in scores.items()}
    bits = {name: [[2 * (1.5 - score), 2.2 * (1.5 - score)] * 9] * 3 for name, score in scores.items()}
    levels = {name: {"4": 1.0, "8": score, "16": score**2} for name, score in scores.items()}
    times = {length: {name: length / 1e3 * score for name, score in scores.items()} for length in (512, 1024, 4096)}
    kept = {name: {length: 64 * length for length in times} for name in scores}
    return results(
        {"recall": samples, "text": bits, "digits": samples},
        {"causal self": times, "noncausal self": times},
        by=levels,
        state_bytes={**kept, "lightning": dict.fromkeys(times, 4096)},
    )


class Marked(HTMLParser):
    """Texts of the elements that say where their number comes from, and addresses a page would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.shown: list[tuple[str, str]] = []
        self.loaded: list[str] = []
        self._source: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self._source = given.get("data-source")
        self.loaded += [
            value for name in ("src", "href") if (value := given.get(name)) and not value.startswith("data:")
        ]

    def handle_data(self, data: str) -> None:
        if self._source is not None:
            self.shown.append((self._source, data))
            self._source = None


def test_every_number_of_a_table_stands_in_the_results(measured: Results):
    content = json.loads(measured.model_dump_json())
    shown = Marked(page(measured)).shown
    assert len(shown) > 100
    for source, text in shown:
        value = resolved(content, source)
        number = re.match(r"-?\d+(\.\d+)?", text)
        if isinstance(value, str) or value is None or number is None:
            continue
        assert value == 0 or any(isclose(float(number[0]), value * unit, rel_tol=0.06) for unit in UNITS), (
            source,
            text,
        )


def test_every_point_of_a_figure_stands_in_the_results(measured: Results):
    content = json.loads(measured.model_dump_json())
    for figure in figures(measured):
        unit = 1e3 if figure.name.startswith("time") else 1e-6 if figure.name.startswith("memory") else 1.0
        drawn = [pair for trace in traces(figure) for pair in zip(trace["customdata"], trace["y"], strict=True)]
        assert len(drawn) == len(figure.points)
        for source, y in drawn:
            assert isclose(y, resolved(content, source) * unit, rel_tol=1e-9), (figure.name, source)


def test_figures_differ_in_marker_and_dash_and_not_in_colour_alone(measured: Results):
    for figure in figures(measured):
        looks = {(trace["marker"]["symbol"], trace.get("line", {}).get("dash")) for trace in traces(figure)}
        assert len(looks) == len(traces(figure)) == 4


def test_captions_say_how_much_was_measured(measured: Results):
    for figure in figures(measured):
        assert re.search(r"\d+ seeds?, |\d+ to \d+ runs|1 run", figure.caption), figure.caption


def test_mechanism_looks_the_same_in_every_figure(measured: Results):
    looks: dict[str, set] = {}
    for figure in figures(measured):
        for trace in traces(figure):
            looks.setdefault(trace["name"].partition(",")[0], set()).add(trace["marker"]["symbol"])
    assert all(len(found) == 1 for found in looks.values())


def test_page_loads_nothing(measured: Results):
    assert not Marked(page(measured)).loaded


def test_results_of_the_page_are_the_results(measured: Results):
    (held,) = re.findall(r'<script type="application/json" id="results">(.*?)</script>', page(measured), re.DOTALL)
    assert Results.model_validate_json(held) == measured


def test_text_cannot_leave_its_place():
    hostile = results(tasks=[])
    hostile.failures["text x 0"] = "</script><script>alert(1)</script><!-- <b>"
    text = page(hostile)
    assert "<script>alert" not in text
    (held,) = re.findall(r'<script type="application/json" id="results">(.*?)</script>', text, re.DOTALL)
    assert Results.model_validate_json(held).failures == hostile.failures


def test_page_of_nothing_can_be_read():
    assert "Nothing" in page(results())


@pytest.fixture(scope="module", params=[DESKTOP, PHONE], ids=["desktop", "phone"])
def opened(request: pytest.FixtureRequest, browser: Any, measured: Results, tmp_path_factory: pytest.TempPathFactory):
    """The report in a browser window, and what the browser said and asked for."""
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(page(measured), encoding="utf-8")
    tab = browser.new_context(viewport=request.param, accept_downloads=True).new_page()
    said: list[str] = []
    asked: list[str] = []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda made: asked.append(made.url))
    tab.goto(path.as_uri())
    tab.wait_for_function("document.querySelectorAll('.chart .main-svg').length > 0")
    return tab, said, asked, path


def test_browser_reports_no_error_and_asks_for_nothing_else(opened):
    _, said, asked, path = opened
    assert not said
    assert [url for url in asked if not url.startswith("data:")] == [path.as_uri()]


def test_every_chart_is_drawn_with_named_axes(opened, measured: Results):
    tab, *_ = opened
    for figure in figures(measured):
        chart = tab.locator(f"#{figure.name}")
        assert chart.locator(".xtitle").text_content()
        assert chart.locator(".ytitle").text_content()
        assert chart.locator(".scatterlayer .trace").count() >= 4
        assert chart.locator(".legend .traces").count() >= 4


def test_page_is_no_wider_than_the_window(opened):
    tab, *_ = opened
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_legends_lie_inside_their_charts(opened):
    tab, *_ = opened
    outside = tab.evaluate(
        """[...document.querySelectorAll('.chart')].filter(chart => {
            const box = chart.getBoundingClientRect();
            return [...chart.querySelectorAll('.legendtext, .xtitle, .ytitle')].some(text => {
                const own = text.getBoundingClientRect();
                return own.left < box.left - 1 || own.right > box.right + 1 || own.bottom > box.bottom + 1;
            });
        }).map(chart => chart.id)"""
    )
    assert not outside


def test_numbers_open_by_keyboard(opened):
    tab, *_ = opened
    details = tab.locator("figure details").first
    details.locator("summary").focus()
    tab.keyboard.press("Enter")
    assert details.locator("td[data-source]").first.is_visible()


def test_button_saves_the_results(opened, measured: Results, tmp_path: Path):
    tab, *_ = opened
    with tab.expect_download() as started:
        tab.locator("#save").click()
    started.value.save_as(tmp_path / "saved.json")
    assert Results.model_validate_json((tmp_path / "saved.json").read_bytes()) == measured
