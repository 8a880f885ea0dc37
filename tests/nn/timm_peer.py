"""timm as a test peer. torchvision imports on a CPU build of torch once the operators it extends are declared."""

from __future__ import annotations

import pytest
import torch

_library = torch.library.Library("torchvision", "FRAGMENT")
for _schema in (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
):
    if not hasattr(torch.ops.torchvision, _schema.partition("(")[0]):
        _library.define(_schema)

pytest.importorskip("timm")

from timm.layers import EcaModule  # noqa: E402  after the declarations above
from timm.layers.cbam import CbamModule  # noqa: E402

__all__ = ["CbamModule", "EcaModule"]
