"""What a benchmark of kernels writes down."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import Field

from regard.bench.results import Folder, Machine, Record, Seconds

Phase = Literal["forward", "training"]


class Verified(Record):
    """How near a kernel came to the reference, computed in double precision, before it was timed."""

    queries: int = Field(description="all of them, or so many of a longer sequence")
    error: float = Field(description="largest error of a row of output or gradients, against that row's norm")


class KernelTiming(Record):
    """One kernel in one case. A kernel that was not verified has no such record."""

    verified: Verified
    seconds: Seconds
    first_seconds: float = Field(description="of the first call, which compiles what is compiled")
    peak_bytes: int | None = Field(description="held beyond the inputs; with the mask, where the kernel is given one")
    share: float = Field(
        description="least time of the FLOPs needed, at the speed of a large matrix product, over its own"
    )


class Auto(Record):
    """What ``backend="auto"`` picks, and how many times slower that is than the best engine it could have picked.

    That is any of ours that takes the case without being compiled for it.
    """

    engine: str
    behind: float | None = Field(description="null where its engine was not timed")
    best: str | None


class KernelCase(Record):
    """All kernels under one mask at one length, measured in turns."""

    pattern: str
    length: int
    phase: Phase
    pairs: int = Field(description="(head, query, key) that the mask allows")
    flops: float = Field(description="needed: 4 per pair and channel, with the backward 14")
    gemm_flops: float = Field(description="FLOP/s of a large matrix product in the same turns")
    auto: Auto
    timings: dict[str, KernelTiming]
    wrong: dict[str, str] = Field(description="kernels whose output or gradients are not the reference's: no time")
    failed: dict[str, str] = Field(description="kernels that began and ended in an error")
    refused: dict[str, str] = Field(description="kernels that do not take the case, and why")


class KernelSettings(Record):
    """What was asked for."""

    patterns: list[str]
    lengths: list[int]
    engines: list[str]
    heads: int
    dim: int
    dtype: str
    device: str
    seed: int


class KernelResults(Record):
    """A whole results file."""

    schema_version: Literal[1] = 1
    kind: Literal["kernels"] = "kernels"
    started: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    settings: KernelSettings
    machine: Machine
    absent: dict[str, str] = Field(default_factory=dict, description="kernels that are not installed")
    cases: dict[str, KernelCase] = Field(default_factory=dict, description='by "pattern length phase"')


class KernelStore(Folder[KernelResults]):
    """The results file of one folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, KernelResults)
