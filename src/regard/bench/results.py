"""What a comparison writes down: ``results.json``, with a schema that is checked when it is read."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Generic, Literal, TypeVar

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from regard.sites.files import replacing

SCHEMA = 1
FILE = "results.json"


class Record(BaseModel):
    """Part of a results file: unknown and missing fields are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Seconds(Record):
    """Median, quartiles and number of the timed runs, in seconds."""

    median: float
    low: float
    high: float
    runs: int


class LayerTiming(Record):
    """One layer at one length. `flops` are those of its matrix products, `share` is that of the machine's limit.

    The limit is the larger of `flops` at the speed of a large matrix product, and of the bytes of input and output
    (twice in training) at the speed of a large copy.
    """

    forward: Seconds
    training: Seconds = Field(description="forward and backward")
    step: Seconds | None = Field(None, description="one further token after `length` others")
    forward_flops: float
    training_flops: float
    forward_share: float
    training_share: float
    forward_peak_bytes: int | None
    training_peak_bytes: int | None
    state_bytes: int | None = Field(None, description="what decoding keeps after `length` tokens")


class TimingCell(Record):
    """All layers at one length, measured in turns, with the machine's limits measured in the same turns."""

    pattern: str
    length: int
    gemm_flops: float = Field(description="FLOP/s of a large matrix product")
    copy_bytes: float = Field(description="bytes/s read and written by a large copy")
    layers: dict[str, LayerTiming]


class QualityCell(Record):
    """One small model, trained and tested."""

    task: str
    mechanism: str
    seed: int
    score: float = Field(description="mean of `samples`")
    samples: list[float] = Field(description="one number per test sample; the same samples for every model")
    by: dict[str, float] = Field(default_factory=dict, description="score by difficulty, where the task has it")
    steps: int
    parameters: int
    train_seconds: float
    state_bytes: int | None = Field(None, description="what decoding keeps after the longest test sample")


class Settings(Record):
    """What was asked for. Two runs with the same settings can be one."""

    mechanisms: list[str]
    tasks: list[str]
    lengths: list[int]
    dim: int
    heads: int
    dtype: str
    device: str
    seed: int


class Machine(Record):
    """Where it was measured."""

    processor: str
    cores: int
    threads: int
    device: str
    system: str
    python: str
    torch: str
    regard: str


class Interval(Record):
    """A score with its 95% interval: over seeds where there are three or more, else over test samples."""

    score: float
    low: float
    high: float
    over: Literal["seeds", "test samples"]
    seeds: int
    samples: int
    by: dict[str, float] = Field(default_factory=dict)


class Sentence(Record):
    """A line of the verdict, and the places in this file that it follows from, as JSON pointers.

    Advice says which `choice` to make for a task, and the `reason`; a finding is a fact; a caveat says what not to
    conclude.
    """

    kind: Literal["advice", "finding", "caveat"] = "finding"
    text: str
    sources: list[str]
    task: str | None = None
    choice: str | None = None
    reason: str | None = None


class Summary(Record):
    """What follows from the cells; computed anew each time the file is written."""

    quality: dict[str, dict[str, Interval]] = Field(default_factory=dict, description="by task and mechanism")
    equal_to_best: dict[str, list[str]] = Field(default_factory=dict, description="by task, best first")
    pareto: dict[str, list[str]] = Field(default_factory=dict, description="by task: nothing else is better and faster")
    efficiency_length: dict[str, dict[str, dict[str, float | None]]] = Field(
        default_factory=dict,
        description="by pattern, mechanism and phase: length from which it is faster than exact attention, 0 if it "
        "is at every length measured, null if at none",
    )
    state_growth: dict[str, float] = Field(
        default_factory=dict, description="bytes that a further token adds to what a layer keeps"
    )
    compositional_index: dict[str, dict[str, float]] = Field(
        default_factory=dict,
        description="by pattern, best first: standard deviations above the average mechanism, over its tasks",
    )
    verdict: list[Sentence] = Field(default_factory=list)


class Results(Record):
    """A whole results file."""

    schema_version: Literal[1] = SCHEMA
    started: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    settings: Settings
    machine: Machine
    timing: dict[str, TimingCell] = Field(default_factory=dict, description='by "pattern length"')
    quality: dict[str, QualityCell] = Field(default_factory=dict, description='by "task mechanism seed"')
    failures: dict[str, str] = Field(default_factory=dict, description="what could not be measured, and why")
    summary: Summary = Field(default_factory=Summary)


class Refusal(ValueError):
    """Something about the arguments or files of a comparison that its user has to change."""


Kept = TypeVar("Kept", bound=Record)


class Folder(Generic[Kept]):
    """A folder with a results file, a `model` with settings and machine; held by one process at a time."""

    def __init__(self, folder: Path, model: type[Kept]) -> None:
        self.folder, self.path, self.model = folder, folder / FILE, model
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(folder / ".lock")
            self._lock.acquire(timeout=0)
        except Timeout:
            raise Refusal(f"{folder} is in use by another comparison; wait for it or choose another --out") from None
        except OSError as error:
            raise Refusal(f"--out {folder} cannot be written ({error.strerror}); choose another folder") from None

    def close(self) -> None:
        """Let others write."""
        self._lock.release()

    def open(self, settings: Record, machine: Machine) -> Kept:
        """The results so far, or none yet.

        Raises Refusal for a file of other settings or another machine, which is left as it is, and for one that cannot
        be read, which is kept aside.
        """
        if not self.path.exists():
            return self.model.model_validate({"settings": settings, "machine": machine})
        results = self.read()
        for kind, wanted in (("settings", settings), ("machine", machine)):
            for name, value in wanted:
                found = getattr(getattr(results, kind), name)
                if found != value:
                    raise Refusal(
                        f"{self.path} holds a run with {name} {_say(found)}, asked for now: {_say(value)}; "
                        "choose another --out, or remove that folder"
                    )
        return results

    def read(self) -> Kept:
        """What the file holds."""
        try:
            return self.model.model_validate_json(self.path.read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
        aside = self._aside()
        self.path.rename(aside)
        reason = f"{where}: {first['msg']}"
        raise Refusal(f"{self.path} is damaged ({reason}); it is kept as {aside.name}: run again to start anew")

    def write(self, results: Kept) -> None:
        """Replace the file, whole or not at all."""
        self.write_text(FILE, results.model_dump_json(indent=1) + "\n")

    def write_text(self, name: str, text: str) -> Path:
        """A file of the folder, whole or not at all."""
        with replacing(self.folder / name) as partial:
            partial.write_text(text, encoding="utf-8")
        return self.folder / name

    def _aside(self) -> Path:
        number = 1
        while (path := self.folder / f"results.damaged-{number}.json").exists():
            number += 1
        return path


class Store(Folder[Results]):
    """The folder of a comparison."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, Results)


def _say(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
