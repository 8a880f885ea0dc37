"""Train one small language model with three mechanisms on Python's own source, and let each continue a line.

    python examples/quickstart.py

Takes under a minute on two cores. The model is the same but for the mechanism's key.
"""

from __future__ import annotations

import argparse
import math
import time

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from regard.models.language import Decoder
from regard.tasks import text

MECHANISMS = {"multi_head": {}, "window": {"window": 32, "sinks": 2}, "lightning": {}}
DIM, HEADS, LAYERS, LENGTH, BATCH = 96, 4, 2, 192, 12


def bits_per_byte(model: Decoder, pieces: Tensor) -> Tensor:
    return F.cross_entropy(model(pieces[:, :-1]).mT, pieces[:, 1:]) / math.log(2)


def train(key: str, options: dict[str, object], steps: int) -> tuple[Decoder, float, float]:
    """The trained model, its bits per byte on held-out files, and the seconds training took."""
    torch.manual_seed(0)
    model = Decoder(256, key, dim=DIM, heads=HEADS, layers=LAYERS, options=options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    random = torch.Generator().manual_seed(0)
    start = time.perf_counter()
    for step in track(range(steps), description=f"{key:12}", transient=True):
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1.0, (step + 1) / 10) * (1 - step / steps)
        optimizer.zero_grad()
        bits_per_byte(model, text.windows(text.source("train"), BATCH, LENGTH + 1, random)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    seconds = time.perf_counter() - start
    with torch.no_grad():
        held_out = text.pieces(text.source("test"), 32, LENGTH + 1)
        return model.eval(), bits_per_byte(model, held_out).item(), seconds


@torch.no_grad()
def continued(model: Decoder, prompt: bytes, length: int) -> str:
    """Sampling, one byte at a time through every mechanism's own state."""
    logits, state = model.step(torch.tensor([list(prompt)]), model.init_state(1))
    written = []
    for _ in range(length):
        token = torch.multinomial((logits[:, -1] / 0.7).softmax(-1), 1)
        written.append(int(token))
        logits, state = model.step(token, state)
    return bytes(written).decode("utf-8", errors="replace")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=250, help="training steps for each mechanism")
    steps = parser.parse_args().steps
    table = Table(title=f"{steps} steps on Python's standard library, {LAYERS} layers, dim {DIM}")
    for column in ("mechanism", "parameters", "bits per byte", "seconds", "'def ' goes on with"):
        table.add_column(column)
    for key, options in MECHANISMS.items():
        model, bits, seconds = train(key, options, steps)
        count = sum(parameter.numel() for parameter in model.parameters())
        said = repr(continued(model, b"\n    def ", 28))
        table.add_row(key, f"{count:,}", f"{bits:.2f}", f"{seconds:.1f}", said)
    Console().print(table)


if __name__ == "__main__":
    main()
