"""The contract of the door with every family, on tiny random models."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.sites.families import FAMILIES
from tests.sites.properties import PROPERTIES, Running, gradients
from tools.families import PAGE, table
from tools.readme import between


@pytest.fixture(scope="session")
def running() -> Callable[[str], Running]:
    """The models, each built once."""
    models = {name: Running(family) for name, family in FAMILIES.items()}
    return models.__getitem__


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("holds", [*PROPERTIES.values(), gradients], ids=lambda holds: holds.__name__)
def test_holds(running: Callable[[str], Running], family: str, holds: Callable[[Running], None]) -> None:
    holds(running(family))


def test_the_page_says_what_is_tested() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == between(page, "families", table(), PAGE.name)
