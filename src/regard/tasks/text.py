"""Byte-level language modelling on the source of Python's own standard library.

The text is on every machine that runs this. Files are split by name, so that a file is on the same side everywhere and
no line is read in training and asked for in the test.
"""

from __future__ import annotations

import sysconfig
from functools import cache
from pathlib import Path
from typing import Literal
from zlib import crc32

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from regard.ops.checks import one_of, require

HELD_OUT = 10
"""One file in this many is held out, by the checksum of its name."""


@cache
def source(split: Literal["train", "test"]) -> UInt8[Tensor, "bytes"]:
    """The top-level modules of the standard library, one after the other in the order of their names."""
    one_of("text", "split", split, ("train", "test"))
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    parts = [path.read_bytes() for path in files if (crc32(path.name.encode()) % HELD_OUT == 0) == (split == "test")]
    require(bool(parts), "text", "the standard library's source is not on this machine", "install Python with it")
    return torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8)


def windows(
    text: UInt8[Tensor, "bytes"], count: int, length: int, random: torch.Generator
) -> Int[Tensor, "count length"]:
    """`count` pieces of `length` bytes from anywhere."""
    require(len(text) >= length, "text", f"length {length} of {len(text)} bytes", "ask for less")
    starts = torch.randint(len(text) - length + 1, (count, 1), generator=random)
    return text[starts + torch.arange(length)].long()


def pieces(text: UInt8[Tensor, "bytes"], count: int, length: int) -> Int[Tensor, "count length"]:
    """`count` pieces of `length` bytes at equal distances: the same ones always."""
    require(len(text) >= length, "text", f"length {length} of {len(text)} bytes", "ask for less")
    starts = torch.linspace(0, len(text) - length, count, dtype=torch.float64).long()
    return text[starts[:, None] + torch.arange(length)].long()
