"""Mixture-of-head attention is the authors' layers, and starts as the multi-head layer it is made from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from regard.nn import MixtureOfHeadAttention, MultiHeadAttention
from regard.nn.heads.moh import balance_loss

GOLDEN = Path(__file__).parents[1] / "golden" / "moh.safetensors"


def golden(case):
    kept = load_file(GOLDEN)
    return {name.removeprefix(f"{case}."): tensor for name, tensor in kept.items() if name.startswith(f"{case}.")}


def authors_names(tensors, kind):
    """The authors' tensors of a kind (weights, gradients) under our names: theirs stack q, k and v."""
    own = {name.removeprefix(kind): value for name, value in tensors.items() if name.startswith(kind)}
    names = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "output", "proj": "output"}
    names |= {"wg": "router", "wg_1": "shared_router", "wg_0": "balance_router"}
    renamed = {}
    for name, value in own.items():
        module, _, part = name.partition(".")
        if module == "qkv":
            renamed |= dict(zip((f"{ours}.{part}" for ours in ("query", "key", "value")), value.chunk(3), strict=True))
        elif module in names:
            renamed[f"{names[module]}.{part}"] = value
    return renamed


def assert_is_the_authors(layer, kept):
    weights, grads = authors_names(kept, "weight."), authors_names(kept, "grad.")
    layer.load_state_dict(weights)
    x = kept["x"].requires_grad_()
    out = layer(x)
    assert_close(out, kept["out"], rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(out, [x, *layer.parameters()], kept["seed"])
    assert_close(found[0], kept["grad.x"], rtol=1e-10, atol=1e-12)
    for (name, _), grad in zip(layer.named_parameters(), found[1:], strict=True):
        assert_close(grad, grads[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("case", "shared", "active"), [("mixed", 2, 5), ("routed", 0, 2), ("shared", 6, 6)])
def test_outputs_and_gradients_are_those_of_the_authors_dit_layer(case, shared, active):
    layer = MixtureOfHeadAttention(
        6, heads=6, head_dim=2, shared_heads=shared, active_heads=active, bias=True, dtype=torch.float64
    )
    assert_is_the_authors(layer, golden(case))


def test_outputs_and_gradients_are_those_of_the_authors_llama_layer():
    """The release is for inference and has no straight-through gradient, nor has ours in eval mode."""
    layer = MixtureOfHeadAttention(
        16,
        heads=8,
        shared_heads=4,
        active_heads=6,
        router="query_norm",
        position="rotary",
        causal=True,
        dtype=torch.float64,
    )
    assert_is_the_authors(layer.eval(), golden("llama"))


@pytest.mark.parametrize(("case", "shared", "active"), [("mixed", 2, 5), ("routed", 0, 2)])
def test_balance_loss_is_the_authors(case, shared, active):
    kept = golden(case)
    layer = MixtureOfHeadAttention(
        6, heads=6, head_dim=2, shared_heads=shared, active_heads=active, bias=True, dtype=torch.float64
    )
    layer.load_state_dict(authors_names(kept, "weight."))
    routing = layer.routing(kept["x"])
    loss = balance_loss(routing.probabilities, routing.chosen)
    assert_close(loss, kept["balance"], rtol=1e-12, atol=0)
    (grad,) = torch.autograd.grad(loss, layer.router.weight)
    assert_close(grad, kept["balance_grad"], rtol=1e-10, atol=1e-13)


def layer_of(**options):
    torch.manual_seed(0)
    return MixtureOfHeadAttention(32, heads=8, dtype=torch.float64, **options)


@pytest.mark.parametrize("causal", [False, True])
def test_output_is_the_weighted_sum_of_the_papers_equation(causal):
    layer = layer_of(shared_heads=3, active_heads=5, causal=causal)
    x = torch.randn(11, 32, dtype=torch.float64)
    alpha = 2 * (x @ layer.balance_router.weight.T).softmax(-1)
    shared = 3 * (x @ layer.shared_router.weight.T).softmax(-1)
    routed = (x @ layer.router.weight.T).softmax(-1)
    routed = routed.where(routed >= routed.sort(-1, descending=True).values[:, 1:2], 0.0)
    gates = torch.cat([alpha[:, :1] * shared, alpha[:, 1:] * 2 * routed / routed.sum(-1, keepdim=True)], dim=-1)
    total = torch.zeros(11, 32, dtype=torch.float64)
    for head in range(8):
        rows = slice(4 * head, 4 * head + 4)
        query, key, value = (x @ linear.weight[rows].T for linear in (layer.query, layer.key, layer.value))
        scores = query @ key.T / 2
        if causal:
            scores = scores + torch.full((11, 11), -torch.inf).triu(1)
        total += gates[:, head, None] * (scores.softmax(-1) @ value @ layer.output.weight[:, rows].T)
    assert_close(layer(x[None])[0], total, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("router", ["learned", "query_norm"])
@pytest.mark.parametrize("options", [{}, {"position": "rotary", "causal": True}, {"head_dim": 6, "bias": True}])
def test_a_converted_layer_is_unchanged_while_all_heads_are_on(router, options):
    multi_head = MultiHeadAttention(32, heads=8, dtype=torch.float64, **options).eval()
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    whole = MixtureOfHeadAttention.from_multi_head(multi_head, active_heads=8, router=router)
    assert_close(whole(x), multi_head(x), rtol=1e-12, atol=1e-12)
    fewer = MixtureOfHeadAttention.from_multi_head(multi_head, active_heads=6, router=router)
    assert not torch.allclose(fewer(x), multi_head(x))
    assert not fewer.training


def test_the_router_without_parameters_adds_none():
    multi_head = MultiHeadAttention(32, heads=8)
    mixture = MixtureOfHeadAttention.from_multi_head(multi_head)
    assert mixture.state_dict().keys() == multi_head.state_dict().keys()


@pytest.mark.parametrize("router", ["learned", "query_norm"])
def test_each_token_turns_on_the_shared_heads_and_as_many_routed_ones_as_asked(router):
    layer = layer_of(shared_heads=2, active_heads=5, router=router)
    weights = layer.routing(torch.randn(3, 50, 32, dtype=torch.float64)).weights
    assert ((weights > 0).sum(-1) == 5).all()
    assert (weights[..., :2] > 0).all()
    assert_close(weights.sum(-1).mean(), torch.tensor(5.0, dtype=torch.float64), rtol=0.2, atol=0)
    assert (weights[..., 2:] > 0).flatten(0, 1).any(0).all()


def test_a_head_that_is_off_reaches_neither_output_nor_gradient():
    layer = layer_of(shared_heads=2, active_heads=4)
    x = torch.randn(1, 1, 32, dtype=torch.float64)
    off = (layer.routing(x).weights[0, 0] == 0).nonzero().flatten()
    assert len(off) == 4
    layer(x).sum().backward()
    grads = layer.value.weight.grad.unflatten(0, (8, 4))
    assert (grads[off] == 0).all()
    assert grads.count_nonzero() == 4 * 4 * 32


def test_in_training_the_gradient_passes_straight_through_to_the_norms():
    layer = layer_of(shared_heads=2, active_heads=4, router="query_norm")
    x = torch.randn(1, 5, 32, dtype=torch.float64)
    weights = layer.train().routing(x).weights
    seed = torch.randn_like(weights)
    probabilities = layer.routing(x).probabilities
    found = torch.autograd.grad(weights, layer.query.weight, seed)
    wanted = torch.autograd.grad(probabilities, layer.query.weight, seed[..., 2:])
    assert_close(found, wanted)
    assert_close(layer.eval().routing(x).weights, weights.detach())
    assert not layer.routing(x).weights.requires_grad


def test_the_balance_loss_is_least_where_routing_is_uniform():
    """Each of 6 heads gets a third of the tokens: the loss is 2. All tokens on two heads: up to 6."""
    uniform = torch.full((1, 6, 6), 1 / 6, dtype=torch.float64)
    spread = torch.eye(6, dtype=torch.bool) | torch.eye(6, dtype=torch.bool).roll(1, 0)
    assert_close(balance_loss(uniform, spread[None]).item(), 2.0)
    crowded = torch.tensor([0.5, 0.5, 0, 0, 0, 0], dtype=torch.float64).expand(1, 6, 6)
    assert_close(balance_loss(crowded, crowded > 0).item(), 6.0)


def test_training_on_the_balance_loss_alone_spreads_the_tokens():
    torch.manual_seed(0)
    layer = MixtureOfHeadAttention(16, heads=8, shared_heads=0, active_heads=2)
    x = torch.randn(4, 64, 16) + 2.0
    optimizer = torch.optim.Adam([layer.router.weight], lr=0.02)

    def loads():
        routing = layer.routing(x)
        return routing, routing.chosen.double().mean((0, 1))

    before = loads()[1].max()
    for _ in range(60):
        routing, _ = loads()
        optimizer.zero_grad()
        balance_loss(routing.probabilities, routing.chosen).backward()
        optimizer.step()
    assert loads()[1].max() < 0.6 * before


def test_tokens_that_do_not_count_leave_the_balance_loss_alone():
    layer = layer_of()
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    tokens = torch.arange(9) < torch.tensor([[9], [4]])
    padded, alone = layer.routing(x), layer.routing(torch.cat([x[0], x[1, :4]])[None])
    found = balance_loss(padded.probabilities, padded.chosen, tokens)
    assert_close(found, balance_loss(alone.probabilities, alone.chosen))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shared_heads": 9}, "shared_heads 9 of heads 8; give a number from 0 to heads"),
        ({"shared_heads": 4, "active_heads": 4}, "active_heads 4 with shared_heads 4 of heads 8"),
        ({"active_heads": 9}, "active_heads 9 with shared_heads 2"),
        ({"shared_heads": 7, "active_heads": 8, "router": "query_norm"}, "router 'query_norm' for 1 routed heads"),
    ],
)
def test_bad_numbers_of_heads_are_named(options, message):
    with pytest.raises(ValueError, match=f"MixtureOfHeadAttention: {message}"):
        layer_of(**options)
