"""torchvision imports on a CPU build of torch once the operators it extends are declared."""

from __future__ import annotations

import torch

_library = torch.library.Library("torchvision", "FRAGMENT")


def declare() -> None:
    """Declare them, where the installed torchvision has not."""
    for schema in (
        "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    ):
        if not hasattr(torch.ops.torchvision, schema.partition("(")[0]):
            _library.define(schema)
