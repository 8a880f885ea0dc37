"""timm as a test peer."""

from __future__ import annotations

import pytest

from tests.vision_peers import declare

declare()
pytest.importorskip("timm")

from timm.layers import EcaModule  # noqa: E402  after the declarations above
from timm.layers.cbam import CbamModule  # noqa: E402

__all__ = ["CbamModule", "EcaModule"]
