"""Sparsifiner is the authors' layer, keeps a budget of keys a query, and trains what chooses them."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from regard.models.vision import Encoder
from regard.nn import MultiHeadAttention, SparsifinerAttention
from regard.nn.sparse import sparsifiner
from regard.ops.masks import Padding
from regard.tasks.digits import CLASSES, GRID, images

GOLDEN = Path(__file__).parents[1] / "golden" / "sparsifiner.safetensors"
OURS = {
    "qkv": "qkv",
    "proj": "output",
    "mask_predictor.proj_c_q": "predictor.query",
    "mask_predictor.proj_c_k": "predictor.key",
    "mask_predictor.proj_n": "predictor.down",
    "mask_predictor.proj_back_n": "predictor.up",
}


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def moved(layer: SparsifinerAttention) -> SparsifinerAttention:
    """The first scores are nearly equal: give the predictor opinions."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.4 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return layer


def built(**options: object) -> SparsifinerAttention:
    given = {"heads": 2, "max_length": 200, "rank": 5, "coefficients": 3, "threshold": 0.1, **options}
    return moved(SparsifinerAttention(12, dtype=torch.float64, **given)).eval()


def authors() -> tuple[SparsifinerAttention, dict[str, Tensor]]:
    kept = load_file(GOLDEN)
    layer = SparsifinerAttention(
        12,
        heads=2,
        max_length=11,
        rank=3,
        coefficients=2,
        threshold=0.05,
        budget=0.4,
        class_token=True,
        dtype=torch.float64,
    )
    weights = {name.removeprefix("weight."): value for name, value in kept.items() if name.startswith("weight.")}
    layer.load_state_dict({our_name(name): value for name, value in weights.items()})
    return layer.eval(), kept


def our_name(name: str) -> str:
    if name in OURS:
        return OURS[name]
    layer, _, kind = name.rpartition(".")
    return f"{OURS[layer]}.{kind}"


def test_outputs_and_gradients_are_those_of_the_authors_layer():
    layer, kept = authors()
    x = kept["x"].requires_grad_()
    out = layer(x)
    assert_close(out, kept["out"], rtol=1e-12, atol=1e-12)
    out.backward(kept["seed"])
    assert_close(x.grad, kept["grad.x"], rtol=1e-11, atol=1e-12)
    for name in ("qkv.weight", "qkv.bias", "proj.weight", "proj.bias"):
        assert_close(layer.get_parameter(our_name(name)).grad, kept[f"grad.{name}"], rtol=1e-11, atol=1e-12)


def test_the_kept_keys_and_their_scores_are_those_of_the_authors_layer():
    layer, kept = authors()
    weights, _ = layer.attention_map(kept["x"])
    assert torch.equal(weights > 0, kept["mask"])
    query, key, _ = layer.project(kept["x"], None, None, None)
    found = layer.predictor(query[:, :, 1:], key, None, None)
    assert_close(found, kept["connectivity"], rtol=1e-12, atol=1e-12)


def test_pruned_tokens_may_be_left_out_where_the_authors_layer_masks_them():
    layer, kept = authors()
    layer.budget = 5  # theirs is that of all tokens
    stay = F.pad(kept["pruned.tokens"], (1, 0), value=True)
    positions = stay.nonzero()[:, 1].view(2, -1)
    rows = positions[..., None].expand(-1, -1, 12)
    out = layer(kept["x"].gather(1, rows), positions=positions)
    # Their class token looks at pruned tokens, too, as at zeros.
    assert_close(out[:, 1:], kept["pruned.out"].gather(1, rows)[:, 1:], rtol=1e-12, atol=1e-12)


def test_the_loss_and_its_gradients_are_the_authors():
    layer, kept = authors()
    loss = 2 * layer.attention_loss(kept["x"], kept["teacher"])
    assert_close(loss, kept["loss"], rtol=1e-12, atol=0)
    loss.backward()
    linear = [f"proj_c_{which}.{kind}" for which in "qk" for kind in ("weight", "bias")]
    names = [f"mask_predictor.{name}" for name in (*linear, "proj_n", "proj_back_n")]
    reached = {name for name, parameter in layer.named_parameters() if parameter.grad is not None}
    assert reached == set(map(our_name, names))
    for name in names:
        wanted = kept[name.replace("mask_predictor", "loss.grad")]
        assert_close(layer.get_parameter(our_name(name)).grad, wanted, rtol=1e-11, atol=1e-11)
    assert_close(2 * layer.attention_loss(kept["x"]), kept["loss.own"], rtol=1e-12, atol=0)


def dense(layer: SparsifinerAttention, x: Tensor, positions: Tensor | None = None) -> Tensor:
    """The formula for one sequence, row by row."""
    length, chooser = x.shape[0], layer.predictor
    places = torch.arange(length) if positions is None else positions
    query, key, value = layer.qkv(x).chunk(3, dim=-1)
    budget = layer.budget if isinstance(layer.budget, int) else math.ceil(layer.budget * length)
    heads = []
    for q, k, v in zip(*(part.split(layer.head_dim, dim=-1) for part in (query, key, value)), strict=True):
        low = chooser.down[places].mT @ chooser.key(k)
        up = chooser.up[places].mT.abs()
        up[up <= chooser.threshold] = 0.0
        rows = []
        for row in range(length):
            allowed = torch.arange(length)
            if row > 0 or not layer.class_token:
                shares = (low @ chooser.query(q[row]) / math.sqrt(layer.heads)).softmax(0)
                order = shares.argsort(descending=True)[: chooser.coefficients]
                allowed = (shares[order] @ up[order]).argsort(descending=True, stable=True)[:budget]
            rows.append((k[allowed] @ q[row] / math.sqrt(layer.head_dim)).softmax(0) @ v[allowed])
        heads.append(torch.stack(rows))
    return layer.output(torch.cat(heads, dim=-1))


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize(
    ("length", "budget"), [(1, 0.25), (2, 7), (17, 0.25), (30, 0.4), (23, 5), (130, 2), (70, 1)], ids=str
)
def test_output_equals_the_formula(length: int, budget: float, class_token: bool):
    layer = built(budget=budget, class_token=class_token)
    x = tokens(2, length, 12)
    expected = torch.stack([dense(layer, sample) for sample in x])
    assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)
    # And the dense choice of all bases.
    layer.predictor.coefficients = None
    assert_close(layer(x)[0], dense(layer, x[0]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("budget", [0.4, 2])
def test_a_padded_sequence_keeps_a_share_of_its_own_tokens(budget: float):
    layer = built(budget=budget, class_token=True)
    x = tokens(3, 150, 12)
    out = layer(x, mask=Padding(torch.tensor([150, 61, 1])))
    for sample, length in enumerate((150, 61, 1)):
        assert_close(out[sample, :length], dense(layer, x[sample, :length]), rtol=1e-10, atol=1e-10)


def test_places_and_tokens_in_another_order_give_the_outputs_in_that_order():
    layer = built()
    x, order = tokens(2, 14, 12), torch.randperm(14, generator=torch.Generator().manual_seed(0))
    assert_close(layer(x[:, order], positions=order), layer(x)[:, order], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
def test_a_budget_for_all_keys_is_the_layer_it_is_made_from(bias: bool):
    given = MultiHeadAttention(12, heads=3, bias=bias, dtype=torch.float64)
    x = tokens(2, 9, 12)
    for budget in (9, 50, 1.0):
        assert_close(SparsifinerAttention.from_multi_head(given, budget=budget)(x), given(x), rtol=1e-12, atol=1e-12)
    assert (SparsifinerAttention.from_multi_head(given)(x) - given(x)).abs().max() > 1e-4


def test_the_weights_have_a_higher_rank_than_what_chooses_them():
    layer = built(rank=2, coefficients=None, budget=5)
    x = tokens(1, 24, 12)
    query, key, _ = layer.project(x, None, None, None)
    assert (torch.linalg.matrix_rank(layer.predictor(query, key, None, None)) == 2).all()
    weights, _ = layer.attention_map(x)
    assert (torch.linalg.matrix_rank(weights) > 2).all()
    assert (weights.count_nonzero(dim=-1) == 5).all()


def test_every_image_has_a_pattern_of_its_own():
    weights, _ = built().attention_map(tokens(2, 24, 12))
    same = ((weights[0] > 0) & (weights[1] > 0)).sum() / (weights[0] > 0).sum()
    assert 0.25 < same < 0.9


def test_keys_without_any_score_go_by_place():
    weights, _ = built(threshold=100.0, budget=4).attention_map(tokens(1, 9, 12))
    assert torch.equal(weights[0, 0] > 0, (torch.arange(9) < 4).expand(9, 9))


@pytest.mark.parametrize("class_token", [False, True])
def test_a_small_budget_is_all_that_is_computed(class_token: bool, monkeypatch: pytest.MonkeyPatch):
    pairs = []
    door = sparsifiner.attention

    def counted(query: Tensor, key: Tensor, *rest: Tensor, **named: object) -> Tensor:
        pairs.append(query.shape[:3].numel() * key.shape[2])
        return door(query, key, *rest, **named)

    monkeypatch.setattr(sparsifiner, "attention", counted)
    built(budget=2, class_token=class_token)(tokens(3, 150, 12))
    assert sum(pairs) == 3 * 2 * (149 * 2 + 150 if class_token else 150 * 2)


@pytest.mark.parametrize("mask", [None, Padding(torch.tensor([20, 7]))], ids=["whole", "padded"])
@pytest.mark.parametrize("class_token", [False, True])
def test_gathered_keys_and_a_mask_give_the_same_outputs_and_gradients(
    class_token: bool, mask: Padding | None, monkeypatch: pytest.MonkeyPatch
):
    layer, x = built(budget=0.3, class_token=class_token).train(), tokens(2, 20, 12).requires_grad_()
    found = []
    for ratio in (1, 64):
        monkeypatch.setattr(sparsifiner, "GATHERED", ratio)
        out = layer(x, mask=mask)
        found.append([out, *torch.autograd.grad(out.sin().sum(), [x, *layer.parameters()])])
    assert all(tensor.abs().max() > 1e-6 for tensor in found[0])
    assert_close(*found, rtol=1e-10, atol=1e-12)


def test_the_gradient_goes_straight_through_to_the_predictor_and_to_nothing_else():
    """As if weights were multiplied by the scores and only their value were 1."""
    layer, x = built(budget=6).train(), tokens(1, 15, 12)
    names = [name for name, _ in layer.predictor.named_parameters()]
    found = torch.autograd.grad(layer(x).sin().sum(), list(layer.parameters()))
    found = dict(zip(dict(layer.named_parameters()), found, strict=True))

    query, key, value = layer.project(x, None, None, None)
    scores = layer.predictor(query, key, None, None)
    kept = layer.attention_map(x)[0] > 0
    weights = (query @ key.mT / math.sqrt(6)).exp() * kept * (1 + scores - scores.detach())
    mixed = weights / weights.sum(-1, keepdim=True) @ value
    wanted = torch.autograd.grad(layer.combine(mixed).sin().sum(), list(layer.predictor.parameters()))
    for name, gradient in zip(names, wanted, strict=True):
        assert gradient.abs().max() > 1e-6
        assert_close(found[f"predictor.{name}"], gradient, rtol=1e-9, atol=1e-12)

    layer.predictor.requires_grad_(False)
    alone = torch.autograd.grad(layer(x).sin().sum(), layer.qkv.weight)[0]
    assert_close(found["qkv.weight"], alone, rtol=1e-12, atol=1e-12)


def test_the_loss_of_a_padded_batch_is_the_mean_of_those_alone():
    layer, x, lengths = built(class_token=True), tokens(3, 13, 12), [13, 6, 1]
    loss = layer.attention_loss(x, mask=Padding(torch.tensor(lengths)))
    alone = [layer.attention_loss(x[i : i + 1, :length]) for i, length in enumerate(lengths)]
    assert_close(loss, torch.stack(alone).mean(), rtol=1e-12, atol=0)


def test_trained_on_its_loss_the_predictor_keeps_what_attention_weighs_most():
    torch.manual_seed(0)
    # Tokens that look at those of their own kind, wherever they stand.
    layer = SparsifinerAttention(8, heads=1, max_length=32, rank=8, budget=8, bias=False)
    layer.qkv.weight.data = torch.cat([3 * torch.eye(8), torch.eye(8), torch.eye(8)])
    centres, kinds = 2 * F.normalize(torch.randn(4, 8), dim=-1), torch.arange(32) % 4
    x = centres[kinds] + 0.1 * torch.randn(64, 32, 8)

    query, key, _ = (part.detach() for part in layer.project(x, None, None, None))
    attention = (query @ key.mT / math.sqrt(8)).softmax(-1)

    def share_of_attention_kept() -> float:
        kept = attention.gather(-1, layer.choose(query, key, None, None).keys).sum(-1).mean()
        return float(kept / attention.topk(8).values.sum(-1).mean())

    before = share_of_attention_kept()
    optimizer = torch.optim.Adam(layer.predictor.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        layer.attention_loss(x).backward()
        optimizer.step()
    assert before < 0.5
    assert share_of_attention_kept() > 0.9


def test_it_learns_digits_and_the_task_alone_reaches_the_predictor():
    torch.manual_seed(0)
    model = Encoder(GRID, 1, CLASSES, "sparsifiner", dim=32, options={"max_length": 64})
    start = copy.deepcopy(model.state_dict())
    pixels, shown = (part[:128] for part in images("train"))
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(12):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(pixels), shown)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.97 * losses[0]
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0, name
        assert not torch.equal(parameter, start[name]), name


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SparsifinerAttention(8, rank=0), "rank 0; give a positive number"),
        (lambda: SparsifinerAttention(8, coefficients=0), "coefficients 0"),
        (lambda: SparsifinerAttention(8, max_length=-1), "max_length -1"),
        (lambda: SparsifinerAttention(8, threshold=-0.1), "threshold -0.1"),
        (lambda: SparsifinerAttention(8, budget=0), "budget 0; give a positive number of keys, or a float"),
        (lambda: SparsifinerAttention(8, budget=1.5), "budget 1.5; give"),
        (lambda: built(max_length=4)(tokens(1, 5, 12)), "5 tokens, built for max_length 4; give fewer"),
        (lambda: built().attention_loss(tokens(1, 5, 12), tokens(1, 2, 5, 4)), r"target of shape \(1, 2, 5, 4\)"),
        (
            lambda: SparsifinerAttention.from_multi_head(MultiHeadAttention(8, causal=True)),
            "a layer with causal=True; convert one with causal=False",
        ),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=rf"SparsifinerAttention[.:].*{message}|SparsifinerAttention\.{message}"):
        call()
