"""timm as a test peer: a folder beside the other packages, and a torchvision that imports on a CPU build of torch."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

_library = torch.library.Library("torchvision", "FRAGMENT")


def declare() -> None:
    """Put timm and torchvision on the path, and declare the operators that torchvision's wheel extends."""
    folder = str(Path(sys.prefix) / "vision")
    if folder not in sys.path:
        sys.path.append(folder)
    for schema in (
        "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    ):
        if not hasattr(torch.ops.torchvision, schema.partition("(")[0]):
            _library.define(schema)
