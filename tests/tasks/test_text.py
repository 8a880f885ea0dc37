"""The text is split by files, the same way everywhere."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest
import torch
from torch import Tensor

from regard.tasks import text

NAMES = [f"module_{number}.py" for number in range(60)]
HELD_OUT = ["module_13.py", "module_26.py", "module_36.py", "module_46.py", "module_7.py"]


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A standard library whose files hold their own names."""
    for name in NAMES:
        (tmp_path / name).write_text(f"<{name}>")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    return tmp_path


def read(split: str) -> str:
    """The text as it is on disk now, past the cache."""
    return bytes(text.source.__wrapped__(split).tolist()).decode()


def sides() -> dict[str, list[str]]:
    return {split: read(split)[1:-1].split("><") for split in ("train", "test")}


@pytest.mark.usefixtures("library")
def test_every_file_is_on_exactly_one_side():
    found = sides()
    assert sorted(found["train"] + found["test"]) == sorted(NAMES)
    assert not set(found["train"]) & set(found["test"])


@pytest.mark.usefixtures("library")
def test_both_sides_have_files_in_the_order_of_their_names():
    for files in sides().values():
        assert files
        assert files == sorted(files)


@pytest.mark.usefixtures("library")
def test_the_same_files_are_held_out_everywhere():
    """As written down once: another machine, folder or process makes no difference."""
    assert sides()["test"] == HELD_OUT


def test_side_of_a_file_depends_on_its_name_only(library: Path):
    held_out = sides()["test"]
    for name in NAMES[::2]:
        if name not in held_out:
            (library / name).unlink()
    for name in held_out:
        (library / name).write_text(f"<{name}>" + "<other content>")
    assert set(read("test")[1:-1].split("><")) == {*held_out, "other content"}


def test_other_files_and_folders_are_left_out(library: Path):
    before = {split: read(split) for split in ("train", "test")}
    (library / "notes.txt").write_text("notes")
    (library / "package").mkdir()
    (library / "package" / "module.py").write_text("deeper")
    assert {split: read(split) for split in ("train", "test")} == before


def test_real_sides_are_disjoint_and_together_everything():
    folder = Path(sysconfig.get_paths()["stdlib"])
    sizes = sum(path.stat().st_size for path in folder.glob("*.py"))
    assert len(text.source("train")) + len(text.source("test")) == sizes
    assert len(text.source("test")) > 100_000
    assert len(text.source("train")) > 3 * len(text.source("test"))


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="text: split 'tests' is not known; did you mean 'test'"):
        text.source("tests")


def test_machine_without_source_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(ValueError, match="text: the standard library's source is not on this machine; install"):
        text.source.__wrapped__("train")


def counting(length: int) -> Tensor:
    """Bytes that are their own places."""
    return torch.arange(length, dtype=torch.uint8)


@pytest.mark.parametrize("length", [1, 7, 200])
def test_windows_are_runs_of_the_text_from_anywhere_inside(length: int):
    found = text.windows(counting(200), 3000, length, torch.Generator().manual_seed(0))
    assert found.dtype == torch.int64
    assert torch.equal(found, found[:, :1] + torch.arange(length))
    assert set(found[:, 0].tolist()) == set(range(200 - length + 1))


def test_windows_follow_their_generator():
    one, same, other = (text.windows(counting(200), 9, 5, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(("count", "length"), [(1, 200), (4, 50), (7, 3), (500, 199)])
def test_pieces_are_runs_at_equal_distances_from_start_to_end(count: int, length: int):
    found = text.pieces(counting(200), count, length)
    assert found.shape == (count, length)
    assert torch.equal(found, found[:, :1] + torch.arange(length))
    starts = found[:, 0]
    distance = (200 - length) / max(count - 1, 1)
    assert starts[0] == 0
    assert (starts - distance * torch.arange(count)).abs().max() <= 1
    assert starts[-1] == (200 - length if count > 1 else 0)


def test_pieces_are_the_same_always():
    torch.manual_seed(0)
    one = text.pieces(counting(200), 9, 5)
    torch.manual_seed(1)
    assert torch.equal(text.pieces(counting(200), 9, 5), one)


@pytest.mark.parametrize("name", ["windows", "pieces"])
def test_more_than_there_is_is_refused(name: str):
    arguments = [counting(5), 2, 6] + ([torch.Generator()] if name == "windows" else [])
    with pytest.raises(ValueError, match="text: length 6 of 5 bytes; ask for less"):
        getattr(text, name)(*arguments)


@pytest.mark.parametrize("name", ["windows", "pieces"])
def test_all_there_is_is_given(name: str):
    arguments = [counting(5), 2, 5] + ([torch.Generator()] if name == "windows" else [])
    assert torch.equal(getattr(text, name)(*arguments), torch.arange(5).expand(2, 5))
