"""A results file is written whole, read with suspicion and never overwritten by another comparison."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from made_up import MACHINE, results

from regard.bench.results import Refusal, Results, Store

Change = Callable[[dict], object]


def some() -> Results:
    """Results with a bit of everything."""
    found = results(
        {"text": {"multi_head": [[2.0, 2.1], [2.2, 2.0]], "lightning": [[2.5, 2.4]]}},
        {"causal self": {512: {"multi_head": 3, "lightning": 1}, 1024: {"multi_head": 9, "lightning": 2}}},
        state_bytes={"lightning": {512: 64, 1024: 64}},
    )
    found.failures["causal self 512 window"] = "RuntimeError: it is made up"
    return found


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(tmp_path / "compare")
    yield opened
    opened.close()


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(Refusal) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def opened(store: Store) -> Results:
    asked = some()
    return store.open(asked.settings, asked.machine)


def aside(store: Store) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.folder.glob("results.damaged-*")}


def test_new_folder_starts_with_nothing(store: Store):
    found = opened(store)
    assert (found.settings, found.machine) == (some().settings, MACHINE)
    assert not found.timing
    assert not found.quality
    assert not store.path.exists()


def test_what_is_written_is_read(store: Store):
    written = some()
    store.write(written)
    assert opened(store) == store.read() == written


def test_numbers_come_back_exactly(store: Store):
    wrote = some()
    wrote.timing["causal self 512"].gemm_flops = 0.1 + 0.2
    wrote.timing["causal self 512"].copy_bytes = 1e-300
    store.write(wrote)
    cell = store.read().timing["causal self 512"]
    assert (cell.gemm_flops, cell.copy_bytes) == (0.1 + 0.2, 1e-300)


def test_file_says_its_version(store: Store):
    store.write(some())
    assert json.loads(store.path.read_text())["schema_version"] == 1


def test_folder_is_made_with_those_above(tmp_path: Path):
    folder = tmp_path / "a" / "b"
    Store(folder).close()
    assert folder.is_dir()


@pytest.mark.parametrize("interrupted", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["full disk", "interrupt"])
def test_write_that_is_cut_off_leaves_the_old_file(
    store: Store, interrupted: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
):
    def fail(*arguments: object) -> None:
        raise error

    store.write(some())
    before = store.path.read_bytes()
    changed = some()
    changed.started = "later"
    with monkeypatch.context() as patch:
        patch.setattr(os, interrupted, fail)
        with pytest.raises(type(error)):
            store.write(changed)
    assert store.path.read_bytes() == before
    assert opened(store) == Results.model_validate_json(before)
    store.write(changed)
    assert opened(store).started == "later"


def test_nothing_is_in_place_before_it_is_on_disk(store: Store, monkeypatch: pytest.MonkeyPatch):
    order = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *given, name=name, real=real: order.append(name) or real(*given))
    store.write(some())
    assert order == ["fsync", "replace"]


def test_first_write_that_is_cut_off_leaves_no_file(store: Store, monkeypatch: pytest.MonkeyPatch):
    def fail(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(KeyboardInterrupt):
            store.write(some())
    assert not store.path.exists()
    assert not opened(store).quality


def test_text_is_written_whole_beside_it(store: Store):
    path = store.write_text("report.html", "<p>ä</p>")
    assert path.parent == store.folder
    assert path.read_text(encoding="utf-8") == "<p>ä</p>"


@pytest.mark.parametrize("part", [0.0, 0.01, 0.3, 0.5, 0.9, 0.999])
def test_file_cut_anywhere_is_damaged(store: Store, part: float):
    store.write(some())
    whole = store.path.read_bytes().rstrip()
    cut = whole[: int(part * len(whole))]
    store.path.write_bytes(cut)
    assert f"{store.path} is damaged (" in refusal(lambda: opened(store))
    assert aside(store) == {"results.damaged-1.json": cut}


def set_schema(content: dict) -> None:
    content["schema_version"] = 2


def drop_settings(content: dict) -> None:
    del content["settings"]


def unknown_field(content: dict) -> None:
    content["settings"]["colour"] = "red"


def wrong_type(content: dict) -> None:
    content["timing"]["causal self 512"]["length"] = "long"


def no_number(content: dict) -> None:
    content["timing"]["causal self 512"]["gemm_flops"] = float("nan")


def deep_list(content: dict) -> None:
    content["quality"]["text lightning 0"]["samples"] = [[1.0]]


DAMAGES: dict[str, Change] = {
    "schema_version": set_schema,
    "settings": drop_settings,
    "settings.colour": unknown_field,
    "timing.causal self 512.length": wrong_type,
    "timing.causal self 512.gemm_flops": no_number,
    "quality.text lightning 0.samples.0": deep_list,
}


@pytest.mark.parametrize("where", DAMAGES)
def test_damage_is_named_and_the_file_kept_aside(store: Store, where: str):
    content = json.loads(some().model_dump_json())
    DAMAGES[where](content)
    store.path.write_text(json.dumps(content))
    damaged = store.path.read_bytes()
    said = refusal(lambda: opened(store))
    assert f"is damaged ({where}: " in said
    assert said.endswith("it is kept as results.damaged-1.json: run again to start anew")
    assert aside(store) == {"results.damaged-1.json": damaged}
    assert not store.path.exists()


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[]", b"null", b'"text"', b"{}\x00", b"\x00" * 64])
def test_what_is_no_results_at_all_is_damaged(store: Store, content: bytes):
    store.path.write_bytes(content)
    assert "is damaged (" in refusal(lambda: opened(store))
    assert aside(store) == {"results.damaged-1.json": content}


def test_next_run_after_damage_starts_anew(store: Store):
    store.path.write_text("{")
    refusal(lambda: opened(store))
    assert not opened(store).quality


def test_second_damaged_file_does_not_replace_the_first(store: Store):
    for content in (b"{", b"[", b"?"):
        store.path.write_bytes(content)
        refusal(lambda: opened(store))
    assert aside(store) == {
        f"results.damaged-{number}.json": text for number, text in ((1, b"{"), (2, b"["), (3, b"?"))
    }


@pytest.mark.parametrize(
    ("name", "value", "found", "asked"),
    [
        ("mechanisms", ["gqa", "window:window=64"], "multi_head,lightning", "gqa,window:window=64"),
        ("tasks", ["text"], "recall,text,digits", "text"),
        ("lengths", [512, 1024], "512", "512,1024"),
        ("dim", 128, "64", "128"),
        ("heads", 4, "2", "4"),
        ("dtype", "bfloat16", "float32", "bfloat16"),
        ("device", "cuda", "cpu", "cuda"),
        ("seed", 5, "0", "5"),
    ],
)
def test_other_settings_are_refused_and_the_file_left(store: Store, name: str, value: object, found: str, asked: str):
    store.write(some())
    before = store.path.read_bytes()
    said = refusal(lambda: store.open(some().settings.model_copy(update={name: value}), MACHINE))
    assert said.startswith(
        f"{store.path} holds a run with {name} {found}, asked for now: {asked}; choose another --out"
    )
    assert store.path.read_bytes() == before
    assert not aside(store)


@pytest.mark.parametrize("name", ["processor", "device", "system", "python", "torch", "regard"])
def test_another_machine_is_refused_and_the_file_left(store: Store, name: str):
    store.write(some())
    before = store.path.read_bytes()
    machine = MACHINE.model_copy(update={name: "another"})
    said = refusal(lambda: store.open(some().settings, machine))
    assert f"{name} {getattr(MACHINE, name)}, asked for now: another" in said
    assert store.path.read_bytes() == before


@pytest.mark.parametrize("name", ["cores", "threads"])
def test_other_cores_are_refused(store: Store, name: str):
    store.write(some())
    said = refusal(lambda: store.open(some().settings, MACHINE.model_copy(update={name: 64})))
    assert f"{name} 2, asked for now: 64" in said


def test_folder_in_use_is_refused(store: Store):
    assert refusal(lambda: Store(store.folder)) == (
        f"{store.folder} is in use by another comparison; wait for it or choose another --out"
    )


def test_folder_is_free_again_after_close(tmp_path: Path):
    Store(tmp_path).close()
    Store(tmp_path).close()


@pytest.mark.parametrize("inside", [".", "deeper"])
def test_file_in_the_place_of_the_folder_is_refused(tmp_path: Path, inside: str):
    (tmp_path / "compare").write_text("a file")
    folder = tmp_path / "compare" / inside
    assert refusal(lambda: Store(folder)).startswith(f"--out {folder} cannot be written (")
    assert (tmp_path / "compare").read_text() == "a file"


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_folder_without_permission_is_refused(tmp_path: Path):
    tmp_path.chmod(0o500)
    try:
        assert "cannot be written (Permission denied)" in refusal(lambda: Store(tmp_path / "compare"))
    finally:
        tmp_path.chmod(0o700)
