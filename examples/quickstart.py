"""Train one small language model with three mechanisms on Python's own source, and let each continue a line.

    python examples/quickstart.py

Takes under a minute on two cores. The model is the same but for the mechanism's key.
"""

from __future__ import annotations

import argparse
import math
import sysconfig
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import regard

MECHANISMS = {
    "multi_head": {"position": "rotary"},
    "window": {"window": 32, "sinks": 2, "position": "rotary"},
    "lightning": {},
}
DIM, HEADS, LAYERS, LENGTH, BATCH = 96, 4, 2, 192, 12


class Block(nn.Module):
    """Pre-norm residual block around a mechanism and an MLP."""

    def __init__(self, key: str, options: dict[str, object]) -> None:
        super().__init__()
        self.mixer = regard.card(key).build(DIM, pattern="causal self", heads=HEADS, **options)
        self.mixer_norm, self.mlp_norm = nn.RMSNorm(DIM), nn.RMSNorm(DIM)
        self.mlp = nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.mixer_norm(x))
        return x + self.mlp(self.mlp_norm(x))

    def step(self, x: Tensor, state: object) -> tuple[Tensor, object]:
        mixed, state = self.mixer.step(self.mixer_norm(x), state)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), state


class LanguageModel(nn.Module):
    """Bytes in, logits of the next byte out."""

    def __init__(self, key: str, options: dict[str, object]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, DIM)
        self.blocks = nn.ModuleList(Block(key, options) for _ in range(LAYERS))
        self.norm, self.head = nn.RMSNorm(DIM), nn.Linear(DIM, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    @torch.no_grad()
    def continue_(self, prompt: bytes, length: int) -> str:
        """Sampling, one byte at a time through every mechanism's own state."""
        states = [block.mixer.init_state(1) for block in self.blocks]
        tokens, written = torch.tensor([list(prompt)]), b""
        for _ in range(length):
            x = self.embedding(tokens)
            for index, block in enumerate(self.blocks):
                x, states[index] = block.step(x, states[index])
            logits = self.head(self.norm(x[:, -1])) / 0.7
            tokens = torch.multinomial(logits.softmax(-1), 1)
            written += bytes([int(tokens)])
        return written.decode("utf-8", errors="replace")


def source_text() -> tuple[Tensor, ...]:
    """The standard library's modules as bytes, split by file: every tenth one is held out."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    parts = (
        b"".join(path.read_bytes() for index, path in enumerate(files) if (index % 10 == 0) is held)
        for held in (False, True)
    )
    return tuple(torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in parts)


def windows(text: Tensor, count: int, random: torch.Generator) -> Tensor:
    starts = torch.randint(len(text) - LENGTH - 1, (count, 1), generator=random)
    return text[starts + torch.arange(LENGTH + 1)].long()


def bits_per_byte(model: LanguageModel, batch: Tensor) -> Tensor:
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()) / math.log(2)


def train(key: str, options: dict[str, object], steps: int) -> tuple[LanguageModel, float, float]:
    """The trained model, its bits per byte on held-out files, and the seconds training took."""
    torch.manual_seed(0)
    model, (text, held_out) = LanguageModel(key, options), source_text()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    random = torch.Generator().manual_seed(0)
    start = time.perf_counter()
    for step in track(range(steps), description=f"{key:12}", transient=True):
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1.0, (step + 1) / 10) * (1 - step / steps)
        optimizer.zero_grad()
        bits_per_byte(model, windows(text, BATCH, random)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    seconds = time.perf_counter() - start
    with torch.no_grad():
        return model.eval(), bits_per_byte(model, windows(held_out, 32, random)).item(), seconds


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
        continued = repr(model.continue_(b"\n    def ", 28))
        table.add_row(key, f"{count:,}", f"{bits:.2f}", f"{seconds:.1f}", continued)
    Console().print(table)


if __name__ == "__main__":
    main()
