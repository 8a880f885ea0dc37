"""TransNormerLLM's attention against its quadratic definition, its first author's code and the paper's claims."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.testing import assert_close

from regard.nn import LightningAttention, TransNormerAttention
from regard.ops.masks import Padding, Segments
from regard.testing.compare import assert_differs

GOLDEN = Path(__file__).parents[1] / "golden" / "transnormer.safetensors"
VARIANTS = [
    {},
    {"layer": 1, "layers": 3},
    {"layer": 2, "layers": 3, "lrpe": True, "bias": True, "head_dim": 5},
    {"lrpe": False},
    {"decay": "alibi", "layers": 3},
]


def build(seed: int = 0, **options) -> TransNormerAttention:
    torch.manual_seed(seed)
    return TransNormerAttention(24, **{"heads": 4, "dtype": torch.float64, **options})


def tokens(length: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(2, length, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def scores(layer: TransNormerAttention, x: torch.Tensor) -> torch.Tensor:
    """a_st, zero where t > s."""

    def heads(tensor):
        return tensor.unflatten(-1, (layer.heads, -1)).transpose(1, 2)

    query, key = heads(F.silu(layer.query(x))), heads(F.silu(layer.key(x)))
    places = torch.arange(x.shape[1], dtype=x.dtype)
    offsets = places[:, None] - places
    decayed = (layer.log_decay[:, None, None] * offsets).exp().tril()
    if layer.angles is None:
        return query @ key.mT * decayed
    turns = (layer.angles[:, None, None] * offsets[..., None]).cos()
    return torch.einsum("bhsd,bhtd,hstd->bhst", query, key, turns) * decayed


def by_definition(layer: TransNormerAttention, x: torch.Tensor) -> torch.Tensor:
    value = layer.value(x).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
    mixed = (scores(layer, x) @ value).transpose(1, 2).flatten(2)
    normed = mixed / (mixed.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return layer.output(normed * layer.gate(x))


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("length", [1, 63, 130])
def test_the_layer_is_its_quadratic_definition(options, length):
    layer, x = build(**options), tokens(length).requires_grad_()
    found, wanted = layer(x), by_definition(layer, x)
    assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    leaves = [x, *layer.parameters()]
    for a, b in zip(*(torch.autograd.grad(out.sin().sum(), leaves) for out in (found, wanted)), strict=True):
        assert_close(a, b, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_decays_are_the_papers_equation(layer):
    wanted = torch.tensor([8 * head / 4 * (1 - layer / 3) for head in (1, 2, 3, 4)], dtype=torch.float64)
    assert_close(build(layer=layer, layers=3).log_decay, -wanted, rtol=1e-6, atol=0)


def test_only_the_first_layer_has_angles():
    assert [build(layer=layer, layers=3).angles is not None for layer in range(3)] == [True, False, False]
    assert build(layer=1, layers=3, lrpe=True).angles.shape == (4, 6)


@pytest.mark.parametrize("layer", [0, 2])
def test_alibis_decay_without_angles_is_lightning_attention(layer):
    ours = build(layer=layer, layers=3, decay="alibi", lrpe=False)
    lightning = LightningAttention(24, heads=4, layer=layer, layers=3, dtype=torch.float64)
    lightning.load_state_dict(ours.state_dict())
    assert_close(ours(tokens(40)), lightning(tokens(40)), rtol=0, atol=0)
    fresh = LightningAttention(24, heads=4, layer=layer, layers=3, dtype=torch.float64)
    assert_close(ours.log_decay, fresh.log_decay, rtol=0, atol=0)


def test_angles_of_zero_are_no_angles():
    turned, plain = build(), build(lrpe=False)
    assert_differs(turned(tokens(20)), plain(tokens(20)), "with angles and without")
    with torch.no_grad():
        turned.angles.zero_()
    assert_close(turned(tokens(20)), plain(tokens(20)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{"layers": 9}, {"layers": 9, "decay": "alibi"}], ids=str)
def test_the_score_of_two_tokens_depends_on_their_distance_only(options):
    """The same tokens later, after others whose keys are zero and leave nothing, give the same."""
    layer, x = build(**options), tokens(12)
    late = torch.cat([torch.zeros(2, 100, 24, dtype=torch.float64), x], dim=1)
    assert_close(layer(late)[:, 100:], layer(x), rtol=1e-9, atol=1e-9)


def test_angles_learn_and_move_the_output():
    layer, x = build(layers=9), tokens(20)
    (gradient,) = torch.autograd.grad(layer(x).sin().sum(), layer.angles)
    assert (gradient.abs() > 1e-12).all()
    before = layer(x)
    with torch.no_grad():
        layer.angles -= 0.1 * gradient
    assert layer(x).sin().sum() < before.sin().sum()


@pytest.mark.parametrize("index", [0, 3])
def test_decay_bounds_what_any_number_of_tokens_leaves(index):
    """The state of one token over and over is a geometric series: it stops at k vᵀ / (1 − λ)."""
    layer = build(layer=index, layers=4, lrpe=False)
    token = tokens(1)
    with torch.no_grad():
        _, once = layer.step(token, layer.init_state(2))
        _, often = layer.step(token.expand(-1, 200, -1), layer.init_state(2))
    limit = once.memory / (1 - layer.log_decay.exp())[:, None, None]
    assert_close(often.memory, limit, rtol=1e-12, atol=1e-14)


def test_the_slowest_head_of_the_last_layer_forgets_by_its_share_of_eight():
    assert_close(build(layer=3, layers=4).log_decay[0].item(), -8 / 4 / 4)


def test_later_layers_see_further():
    x = tokens(30)

    def far_share(index: int) -> float:
        layer, leaf = build(layer=index, layers=4, lrpe=False), x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(layer(leaf)[:, -1].sin().sum(), leaf)
        return float(gradient[:, :-10].abs().sum() / gradient.abs().sum())

    shares = [far_share(index) for index in range(4)]
    assert all(later > 10 * earlier for earlier, later in pairwise(shares)), shares


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("pieces", [[1] * 70, [3, 64, 1, 2]], ids=["tokens", "pieces"])
def test_steps_equal_forward(options, pieces):
    layer, x = build(**options), tokens(70)
    with torch.no_grad():
        outputs, state = [], layer.init_state(2)
        for piece in x.split(pieces, dim=1):
            out, state = layer.step(piece, state)
            outputs.append(out)
        assert_close(torch.cat(outputs, dim=1), layer(x), rtol=1e-9, atol=1e-10)
    assert state.seen == 70


def state_bytes(state) -> int:
    return sum(part.untyped_storage().nbytes() for part in state)


@pytest.mark.parametrize(("options", "rows"), [({}, 12), ({"lrpe": False}, 6)], ids=["first", "later"])
def test_the_state_is_as_large_after_ten_thousand_tokens_as_after_ten(options, rows):
    layer = build(dtype=torch.float32, **options)
    sizes = {0: state_bytes(layer.init_state(2))}
    with torch.no_grad():
        state = layer.init_state(2)
        for seen in (10, 10_000):
            _, state = layer.step(torch.randn(2, seen - int(state.seen), 24), state)
            sizes[int(state.seen)] = state_bytes(state)
    assert sizes == dict.fromkeys((0, 10, 10_000), 2 * 4 * rows * 6 * 4 + 8)


def test_a_late_token_is_decoded_at_its_place():
    """Single precision: ten thousand tokens in, a step is still what float64 gives."""
    layer, x = build(layers=9), tokens(10_001)
    with torch.no_grad():
        _, state = layer.step(x[:, :-1], layer.init_state(2))
        wanted, _ = layer.step(x[:, -1:], state)
        layer, x = layer.float(), x.float()
        _, state = layer.step(x[:, :-1], layer.init_state(2))
        found, _ = layer.step(x[:, -1:], state)
    assert_close(found.double(), wanted, rtol=1e-2, atol=1e-3)


def test_packed_sequences_start_anew_where_they_stand():
    layer, x = build(layers=9), tokens(30)
    packed = layer(x, mask=Segments.from_lengths([7, 13, 10]))
    alone = torch.cat([layer(piece) for piece in x.split([7, 13, 10], dim=1)], dim=1)
    assert_close(packed, alone, rtol=1e-9, atol=1e-10)
    assert_differs(packed[:, 7:], layer(x)[:, 7:], "packed and not")


def test_an_unknown_decay_is_refused():
    with pytest.raises(ValueError, match="decay 'linar' is not known; did you mean 'linear'"):
        build(decay="linar")


def test_a_layer_beyond_the_last_is_refused():
    with pytest.raises(ValueError, match="TransNormerAttention: layer 3 of layers 3"):
        build(layer=3, layers=3)


def load(layer: TransNormerAttention, kept: dict[str, torch.Tensor], prefix: str) -> None:
    """The author's one projection is ours of query, key, value and gate."""
    projections = kept[f"{prefix}.qkvu_proj.weight"].chunk(4)
    with torch.no_grad():
        for ours, weight in zip((layer.query, layer.key, layer.value, layer.gate), projections, strict=True):
            ours.weight.copy_(weight)
        layer.output.weight.copy_(kept[f"{prefix}.out_proj.weight"])
        if layer.angles is not None:
            layer.angles.copy_(kept[f"{prefix}.lrpe.theta"][:, 0])


@pytest.fixture(scope="module")
def kept() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN)


def authors_layer(kept: dict[str, torch.Tensor], index: int) -> TransNormerAttention:
    layer = TransNormerAttention(8, heads=4, layer=index, layers=3, decay="alibi", dtype=torch.float64)
    load(layer, kept, f"model.weight.transnormer.h.{index}.token_mixer")
    return layer


@pytest.mark.parametrize(("name", "index"), [("first", 0), ("middle", 1)])
def test_outputs_and_gradients_are_those_of_the_authors_layer(kept, name, index):
    layer, x = authors_layer(kept, index), kept[f"{name}.x"].requires_grad_()
    mask = Padding(kept["lengths"])
    out = layer(x, mask=mask)
    real = mask.real(8)
    assert_close(out[real], kept[f"{name}.out"][real], rtol=1e-11, atol=1e-12)
    found = torch.autograd.grad(out, [x, *layer.parameters()], kept[f"{name}.seed"])
    found = dict(zip(["x", *(name for name, _ in layer.named_parameters())], found, strict=True))
    joint = torch.cat([found[f"{part}.weight"] for part in ("query", "key", "value", "gate")])
    pairs = {"x": found["x"], "qkvu_proj.weight": joint, "out_proj.weight": found["output.weight"]}
    if layer.angles is not None:
        pairs["lrpe.theta"] = found["angles"][:, None]
    for part, gradient in pairs.items():
        assert_close(gradient, kept[f"{name}.grad.{part}"], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(("name", "index"), [("first", 0), ("middle", 1)])
def test_decoding_goes_as_in_the_authors_layer(kept, name, index):
    layer, x = authors_layer(kept, index), kept[f"{name}.x"]
    with torch.no_grad():
        outputs, state = [], layer.init_state(2)
        for piece in x.split([5, 1, 1, 1], dim=1):
            out, state = layer.step(piece, state)
            outputs.append(out)
    assert_close(torch.cat(outputs, dim=1), kept[f"{name}.decoded"], rtol=1e-11, atol=1e-12)
    assert_close(state.memory, kept[f"{name}.memory"], rtol=1e-11, atol=1e-12)
