"""Takes the README's picture of a report: `python tools/picture.py compare/report.html`. Needs Chromium."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

PICTURE = Path(__file__).parent.parent / "docs" / "report.png"
WINDOW = {"width": 1200, "height": 1320}


def main(report: Path) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport=WINDOW)
        page.goto(report.resolve().as_uri())
        page.wait_for_function("document.querySelectorAll('.chart .main-svg').length > 0")
        # What fits into the window is the verdict and the first figures; the table between them is long.
        page.add_style_tag(content="#overview-section { display: none } h2 { margin-top: 1.5rem }")
        page.evaluate("window.dispatchEvent(new Event('resize'))")
        page.wait_for_timeout(500)
        page.screenshot(path=PICTURE)
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
