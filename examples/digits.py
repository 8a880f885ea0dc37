"""Classify handwritten digits with one encoder around mechanisms of three kinds: tokens, a grid, a feature map.

    python examples/digits.py

Takes about a minute on two cores. Needs scikit-learn.
"""

from __future__ import annotations

import argparse

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.nn import functional as F

import regard
from regard.models.vision import Encoder
from regard.tasks import digits

MECHANISMS = {"multi_head": {}, "efficient_attention": {}, "dinat": {"kernel_size": 3}, "eca": {}}


def train(key: str, options: dict[str, object], steps: int) -> tuple[Encoder, float]:
    """The trained model and its accuracy on held-out images."""
    torch.manual_seed(0)
    model = Encoder(digits.GRID, 1, digits.CLASSES, key, dim=64, heads=2, layers=2, options=options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps + 1)
    images, labels = digits.images("train")
    for _ in track(range(steps), description=f"{key:20}", transient=True):
        chosen = torch.randint(len(images), (32,))
        optimizer.zero_grad()
        F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
        schedule.step()
    images, labels = digits.images("test")
    with torch.no_grad():
        return model, (model(images).argmax(-1) == labels).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400, help="training steps for each mechanism")
    steps = parser.parse_args().steps
    table = Table("mechanism", "takes", "parameters", "accuracy", title=f"{steps} steps on 8×8 images")
    for key, options in MECHANISMS.items():
        model, accuracy = train(key, options, steps)
        count = sum(parameter.numel() for parameter in model.parameters())
        table.add_row(key, regard.card(key).contract.input, f"{count:,}", f"{accuracy:.1%}")
    Console().print(table)


if __name__ == "__main__":
    main()
