"""HyenaDNA is its authors' model, as large as the papers that use it say, and decodes as it reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from moved import moved, never_learning
from safetensors.torch import load_file
from torch.testing import assert_close

from regard.models.language import HYENADNA_SIZES, HyenaDNA

GOLDEN = Path(__file__).parents[1] / "golden" / "hyena.safetensors"
# In the order in which they replace parts of our names.
AUTHORS = {
    "embedding.weight": "embeddings.word_embeddings.weight",
    "blocks": "layers",
    "norms.0": "norm1",
    "norms.1": "norm2",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
    "mixer.input": "mixer.in_proj",
    "mixer.short": "mixer.short_filter",
    "mixer.output": "mixer.out_proj",
    "mixer.skip": "mixer.filter_fn.bias",
    "mixer.filter.frequency": "mixer.filter_fn.implicit_filter.1.freq",
    "mixer.filter.layers.0": "mixer.filter_fn.implicit_filter.0",
    "mixer.filter.layers.1": "mixer.filter_fn.implicit_filter.2",
    "mixer.filter.layers.2": "mixer.filter_fn.implicit_filter.4",
    "mixer.filter.output": "mixer.filter_fn.implicit_filter.6",
}


def authors(name: str) -> str:
    if name.startswith("norm."):
        return name.replace("norm", "ln_f")
    for ours, theirs in AUTHORS.items():
        name = name.replace(ours, theirs)
    return name


def build(**changes: object) -> HyenaDNA:
    torch.manual_seed(0)
    return moved(HyenaDNA(12, **{"dim": 8, "dropout": 0.0, "dtype": torch.float64, **changes}))


def tokens(length: int = 14, seed: int = 1) -> torch.Tensor:
    return torch.randint(12, (2, length), generator=torch.Generator().manual_seed(seed))


def test_logits_and_gradients_are_those_of_the_authors_model():
    golden = load_file(GOLDEN)
    model = HyenaDNA(12, dim=4, options={"filter_length": 16, "filter_width": 8}, dtype=torch.float64).eval()
    own = dict(model.named_parameters())
    weights = {name: golden[f"model.weight.{authors(name)}"].view_as(tensor) for name, tensor in own.items()}
    model.load_state_dict(weights, strict=False)
    logits = model(golden["model.tokens"])
    assert_close(logits, golden["model.logits"], rtol=1e-11, atol=1e-11)
    found = torch.autograd.grad(logits, list(own.values()), golden["model.seed"])
    for name, gradient in zip(own, found, strict=True):
        wanted = golden[f"model.grad.{authors(name)}"].view_as(gradient)
        assert_close(gradient, wanted, rtol=1e-9, atol=1e-9 * wanted.abs().max().item())


@pytest.mark.parametrize(("size", "thousands"), [("tiny", 436), ("tiny-d256", 1641), ("medium", 6550)])
def test_sizes_are_those_of_the_paper(size: str, thousands: int):
    """436 K on the GenomicBenchmarks, 1.6 M on the Nucleotide Transformer's tasks and 6.6 M for a million tokens."""
    model = HyenaDNA(16, **HYENADNA_SIZES[size], device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) // 1000 == thousands


def test_weights_start_with_the_authors_deviations():
    torch.manual_seed(0)
    model = HyenaDNA(500, dim=64, layers=8)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            wanted = 0.005 if name.endswith(("mixer.output", "mlp.2")) else 0.02
            assert module.weight.std().item() == pytest.approx(wanted, rel=0.1), name
            assert module.bias is None or (module.bias == 0).all(), name


def test_embedding_and_head_share_their_weights():
    model = build()
    assert model.head.weight is model.embedding.weight


def test_only_embeddings_are_dropped_and_only_in_training():
    model = build(dropout=0.5)
    assert torch.equal(model.eval()(tokens()), build()(tokens()))
    assert (model.train().embed(tokens()) == 0).float().mean().item() == pytest.approx(0.5, abs=0.15)


def test_every_parameter_learns():
    assert not never_learning(build, tokens())


@pytest.mark.parametrize("pieces", [[1] * 14, [9, 1, 1, 3]], ids=["tokens", "pieces"])
def test_steps_equal_forward(pieces: list[int]):
    model, x = build(options={"order": 3}), tokens()
    state, outputs = model.init_state(2), []
    with torch.no_grad():
        for piece in x.split(pieces, dim=1):
            out, state = model.step(piece, state)
            outputs.append(out)
        assert_close(torch.cat(outputs, 1), model(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("given", "message"), [({"layers": 0}, "layers 0"), ({"dropout": 1.5}, "dropout 1.5; give a probability")]
)
def test_what_does_not_fit_is_named(given: dict[str, object], message: str):
    with pytest.raises(ValueError, match=f"HyenaDNA: {message}"):
        HyenaDNA(12, **given)
