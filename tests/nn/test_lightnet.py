"""LightNet against its quadratic definition and its recurrence, its first author's code, and the paper's claims."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from regard.nn import LightNetAttention, LightNetGridAttention, LightningAttention
from regard.nn.linear.lightnet import MdTpe, md_lrpe
from regard.ops.masks import Segments
from regard.ops.positions import grid_positions
from regard.testing.compare import assert_differs

GOLDEN = Path(__file__).parents[1] / "golden" / "lightnet.safetensors"
VARIANTS = [{}, {"tpe": False, "gate_rank": 3}, {"lrpe": False, "bias": True}, {"tpe": False, "lrpe": False}]


def build(**options) -> LightNetAttention:
    torch.manual_seed(0)
    layer = LightNetAttention(24, **{"heads": 4, "dtype": torch.float64, **options})
    return perturbed(layer)


def build_grid(**options) -> LightNetGridAttention:
    torch.manual_seed(0)
    return perturbed(LightNetGridAttention(24, **{"heads": 4, "dtype": torch.float64, **options}))


def perturbed(module):
    """Parameters away from where they start, so that none is 0 or 1 or the same in all heads."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return module


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def encoded(tpe: MdTpe, x: Tensor) -> Tensor:
    """MD-TPE with its Toeplitz matrices."""
    total = torch.zeros_like(x)
    for axis in range(tpe.axes):
        place = torch.arange(x.shape[axis + 1], dtype=x.dtype)
        offset = (place[:, None] - place).clamp(min=0)
        decay = (-tpe.log_rate[axis].exp()).exp()[:, None, None]
        matrix = (tpe.read[axis] * tpe.write[axis]).sum(-1)[:, None, None] * (decay**offset).tril()
        lines = x.movedim(axis + 1, -2).unflatten(-1, (tpe.heads, -1))
        mixed = torch.einsum("hnm,...mhd->...nhd", matrix, lines).flatten(-2)
        total = total + tpe.outputs[axis](tpe.norms[axis](mixed)).movedim(-2, axis + 1)
    return total


def parts(layer: LightNetAttention | LightNetGridAttention, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    projected = F.silu(layer.query(tokens)), layer.key(tokens), layer.value(tokens)
    query, key, value = (part.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for part in projected)
    return query, key, value


def read_out(layer: LightNetAttention | LightNetGridAttention, tokens: Tensor, mixed: Tensor) -> Tensor:
    return layer.output(layer.norm(mixed.transpose(1, 2).flatten(2)) * layer.gate(tokens).sigmoid())


def by_definition(layer: LightNetAttention | LightNetGridAttention, x: Tensor) -> Tensor:
    """A softmax over tokens for every query, token and feature, times the cosine of the feature's axis."""
    places = grid_positions(*x.shape[1:-1])
    tokens = (x if layer.tpe is None else encoded(layer.tpe, x)).flatten(1, -2)
    query, key, value = parts(layer, tokens)
    length = key.shape[2]
    weights = key[:, :, None].expand(-1, -1, length, -1, -1)
    if layer.causal:
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        weights = weights.masked_fill(future[..., None], -torch.inf)
    weights = weights.softmax(3)
    if layer.angles is not None:
        offsets = (places[:, None] - places).to(x.dtype)
        shares = [len(share) for share in torch.arange(layer.head_dim).tensor_split(layer.axes)]
        turns = [offsets[..., axis, None] * layer.angles[:, None, None, :n] for axis, n in enumerate(shares)]
        weights = weights * torch.cat(turns, -1).cos()
    mixed = torch.einsum("bhtd,bhtsd,bhse->bhte", query, weights, value)
    return read_out(layer, tokens, mixed).view(x.shape)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("length", [1, 63, 131])
def test_the_layer_is_its_quadratic_definition(causal, options, length):
    layer, x = build(causal=causal, **options), draw(2, length, 24).requires_grad_()
    found, wanted = layer(x), by_definition(layer, x)
    assert_close(found, wanted, rtol=1e-10, atol=1e-11)
    leaves = [x, *layer.parameters()]
    for a, b in zip(*(torch.autograd.grad(out.sin().sum(), leaves) for out in (found, wanted)), strict=True):
        assert_close(a, b, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("grid", [(7,), (5, 9), (1, 6), (3, 4, 6)], ids=str)
def test_the_layer_over_a_grid_is_its_quadratic_definition(causal, grid):
    layer, x = build_grid(causal=causal, axes=len(grid)), draw(2, *grid, 24)
    assert_close(layer(x), by_definition(layer, x), rtol=1e-10, atol=1e-11)


def test_the_causal_layer_is_the_papers_recurrence():
    """g_t = g_{t−1} + exp(k_t),  S_t = (g_{t−1} / g_t) S_{t−1} + (exp(k_t) / g_t) v_tᵀ,  o_t = q_t S_t."""
    layer, x = build(causal=True, tpe=False, lrpe=False), draw(2, 40, 24)
    query, key, value = parts(layer, x)
    total, state, outputs = torch.zeros_like(key[:, :, 0]), torch.zeros(2, 4, 6, 6, dtype=x.dtype), []
    for q, k, v in zip(query.unbind(2), key.unbind(2), value.unbind(2), strict=True):
        before, total = total, total + k.exp()
        state = (before / total)[..., None] * state + (k.exp() / total)[..., None] * v[..., None, :]
        outputs.append((q[..., None, :] @ state).squeeze(-2))
    assert_close(layer(x), read_out(layer, x, torch.stack(outputs, 2)), rtol=1e-11, atol=1e-12)


def test_an_axis_of_a_grid_is_a_sequence():
    tokens, grid = build(causal=True), build_grid(causal=True, axes=1)
    grid.load_state_dict(tokens.state_dict())
    assert_close(grid(draw(2, 30, 24)), tokens(draw(2, 30, 24)), rtol=1e-11, atol=1e-12)


def test_keys_of_zero_make_the_state_a_running_mean_of_outer_products():
    layer, x = build(causal=True, tpe=False, lrpe=False), draw(2, 90, 24)
    with torch.no_grad():
        layer.key.weight.zero_()
    query, _, value = parts(layer, x)
    mean = value.cumsum(2) / torch.arange(1, 91)[:, None]
    assert_close(layer(x), read_out(layer, x, query.sum(-1, keepdim=True) * mean), rtol=1e-10, atol=1e-11)


def test_what_came_before_counts_as_a_set():
    """An additive recurrence forgets the order; a multiplicative one has it in every weight."""
    x, order = draw(1, 80, 24), torch.cat([torch.randperm(79), torch.tensor([79])])
    layer = build(causal=True, tpe=False, lrpe=False)
    assert_close(layer(x[:, order])[:, -1], layer(x)[:, -1], rtol=1e-10, atol=1e-11)
    lightning = LightningAttention(24, heads=4, dtype=torch.float64)
    assert_differs(lightning(x[:, order])[:, -1], lightning(x)[:, -1], "lightning attention after another order")


def test_one_pass_over_an_image_serves_any_order_of_its_positions():
    layer, x = build_grid(tpe=False, lrpe=False), draw(1, 6, 7, 24)
    order = torch.randperm(42)
    shuffled = layer(x.flatten(1, 2)[:, order].view(x.shape)).flatten(1, 2)
    assert_close(shuffled, layer(x).flatten(1, 2)[:, order], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("kept", ["tpe", "lrpe"])
def test_each_positional_encoding_tells_positions_apart(kept):
    layer, x = build_grid(**{"tpe": False, "lrpe": False, kept: True}), draw(1, 6, 7, 24)
    order = torch.randperm(42)
    shuffled = layer(x.flatten(1, 2)[:, order].view(x.shape)).flatten(1, 2)
    assert_differs(shuffled, layer(x).flatten(1, 2)[:, order], f"positions with {kept}")


def test_products_after_md_lrpe_depend_on_offsets_along_each_axis_only():
    x, y, angles = draw(1, 2, 1, 6), draw(1, 2, 1, 6, seed=2), draw(2, 3)

    def product(first, second):
        at = (torch.tensor([place]) for place in (first, second))
        return (md_lrpe(x, next(at), angles) * md_lrpe(y, next(at), angles)).sum(-1)

    assert_close(product((4, 9), (1, 2)), product((7, 10), (4, 3)), rtol=1e-10, atol=1e-12)
    assert_differs(product((4, 9), (1, 2)), product((9, 4), (2, 1)), "products with the axes swapped")


def test_md_tpe_moves_with_its_input():
    """Along an axis t depends on the offset only: zeros before a grid move what comes out."""
    tpe, x = perturbed(MdTpe(12, heads=3, axes=2, dtype=torch.float64)), draw(1, 4, 5, 12)
    moved = tpe(F.pad(x, (0, 0, 3, 0, 2, 0)))
    assert_close(moved[:, 2:, 3:], tpe(x), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_of_ten_thousand_either_way_are_softmax_too(causal, dtype):
    layer, x = build(causal=causal, tpe=False).to(dtype), draw(1, 100, 24).to(dtype)
    with torch.no_grad():
        layer.key.weight *= 1e4 / parts(layer, x)[1].abs().max()
    key = parts(layer, x)[1]
    assert key.amin() < -5e3
    assert key.amax() > 5e3
    x.requires_grad_()
    found, wanted = layer(x), by_definition(layer, x)
    # A float32 near 1e4 is rounded to a thousandth, which is what its weight is off by.
    assert_close(found, wanted, rtol=0, atol=2e-2 if dtype == torch.float32 else 1e-9)
    for gradient in torch.autograd.grad(found.sum(), [x, *layer.parameters()]):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("pieces", [[1] * 70, [3, 64, 1, 2]], ids=["tokens", "pieces"])
def test_steps_equal_forward(options, pieces):
    layer, x = build(causal=True, **options), draw(2, 70, 24)
    with torch.no_grad():
        outputs, state = [], layer.init_state(2)
        for piece in x.split(pieces, dim=1):
            out, state = layer.step(piece, state)
            outputs.append(out)
        assert_close(torch.cat(outputs, dim=1), layer(x), rtol=1e-9, atol=1e-10)
    assert state.seen == 70


@pytest.mark.parametrize(("lrpe", "rows"), [(True, 12), (False, 6)])
def test_the_state_is_as_large_after_ten_thousand_tokens_as_after_ten(lrpe, rows):
    layer, sizes = build(causal=True, lrpe=lrpe, dtype=torch.float32), {}
    with torch.no_grad():
        state = layer.init_state(2)
        for seen in (10, 10_000):
            _, state = layer.step(torch.randn(2, seen - int(state.seen), 24), state)
            sizes[seen] = sum(part.untyped_storage().nbytes() for part in state)
    # The average, log g and the state of TPE in float32, and the count.
    assert sizes == dict.fromkeys((10, 10_000), 2 * 4 * (rows * 6 + 6 + 6) * 4 + 8)


@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences_start_anew_where_they_stand(causal):
    layer, x = build(causal=causal), draw(2, 160, 24)
    with torch.no_grad():
        # A sequence with keys far above those of its neighbours.
        x[:, 71:84] *= 300
    lengths = [70, 1, 13, 76]
    packed = layer(x, mask=Segments.from_lengths(lengths))
    alone = torch.cat([layer(piece) for piece in x.split(lengths, dim=1)], dim=1)
    assert_close(packed, alone, rtol=1e-9, atol=1e-10)


def test_a_new_decay_of_tpe_is_one_half():
    assert_close((-MdTpe(8, heads=2).log_rate.exp()).exp(), torch.full((1, 2), 0.5))


def test_four_axes_are_refused():
    with pytest.raises(ValueError, match="LightNetGridAttention: axes 4"):
        LightNetGridAttention(24, axes=4)


@pytest.fixture(scope="module")
def kept() -> dict[str, Tensor]:
    return load_file(GOLDEN)


def test_md_tpe_is_the_authors_with_gradients(kept):
    tpe, x = MdTpe(8, heads=2, axes=3, dtype=torch.float64), kept["tpe.x"].requires_grad_()
    theirs = [
        {name.split(f"tpes.{axis}.")[1]: name for name in kept if name.startswith(f"tpe.weight.tpes.{axis}.")}
        for axis in range(3)
    ]
    with torch.no_grad():
        for axis, names in enumerate(theirs):
            tpe.read[axis] = kept[names["q"]].view(2, 4)
            tpe.write[axis] = kept[names["k"]].view(2, 4)
            # λ is their sigmoid.
            tpe.log_rate[axis] = (-F.logsigmoid(kept[names["log_decay"]])).log()
            tpe.norms[axis].weight.copy_(kept[names["norm.weight"]])
            tpe.outputs[axis].weight.copy_(kept[names["o_proj.weight"]])
    out = tpe(x)
    assert_close(out, kept["tpe.out"], rtol=1e-11, atol=1e-12)
    names = ["x", "read", "write"] + [f"outputs.{axis}.weight" for axis in range(3)]
    leaves = [x, *(tpe.get_parameter(name) for name in names[1:])]
    found = dict(zip(names, torch.autograd.grad(out, leaves, kept["tpe.seed"]), strict=True))
    assert_close(found["x"], kept["tpe.grad.x"], rtol=1e-9, atol=1e-11)
    for axis in range(3):
        grads = {name: kept[full.replace("weight", "grad", 1)] for name, full in theirs[axis].items()}
        assert_close(found["read"][axis].flatten(), grads["q"], rtol=1e-9, atol=1e-11)
        assert_close(found["write"][axis].flatten(), grads["k"], rtol=1e-9, atol=1e-11)
        assert_close(found[f"outputs.{axis}.weight"], grads["o_proj.weight"], rtol=1e-9, atol=1e-11)


def test_md_lrpe_is_the_authors(kept):
    found = md_lrpe(kept["lrpe.x"].flatten(2, 4), grid_positions(3, 4, 2), kept["lrpe.theta"])
    assert_close(found, kept["lrpe.out"], rtol=1e-12, atol=1e-12)


def test_the_causal_layer_is_the_authors_with_gradients(kept):
    layer = LightNetAttention(8, heads=2, causal=True, tpe=False, dtype=torch.float64)
    x = kept["layer.x"].requires_grad_()
    pairs = {
        "query.weight": "q_proj.weight",
        "key.weight": "k_proj.weight",
        "value.weight": "v_proj.weight",
        "output.weight": "o_proj.weight",
        "norm.weight": "norm.weight",
        "norm.bias": "norm.bias",
        "gate.0.weight": "output_gate.0.weight",
        "gate.1.weight": "output_gate.1.weight",
    }
    with torch.no_grad():
        for ours, theirs in pairs.items():
            layer.get_parameter(ours).copy_(kept[f"layer.weight.{theirs}"])
        assert isinstance(layer.angles, nn.Parameter)
        layer.angles.copy_(kept["layer.theta"].expand(2, -1))
    out = layer(x)
    assert_close(out, kept["layer.out"], rtol=1e-10, atol=1e-11)
    leaves = [x, *(layer.get_parameter(name) for name in pairs)]
    gradients = torch.autograd.grad(out, leaves, kept["layer.seed"])
    for found, wanted in zip(gradients, ["x", *pairs.values()], strict=True):
        assert_close(found, kept[f"layer.grad.{wanted}"], rtol=1e-9, atol=1e-10)
