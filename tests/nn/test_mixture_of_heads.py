"""A mixture of attention heads is the authors' layer, equals computing every head, and costs the chosen ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from regard.nn import MixtureOfAttentionHeads, MultiQueryAttention
from regard.nn.heads.mixture_of_heads import Dispatch, balance_loss, z_loss
from regard.ops.masks import Causal

GOLDEN = Path(__file__).parents[1] / "golden" / "mixture_of_heads.safetensors"


@pytest.fixture(scope="module")
def kept():
    return load_file(GOLDEN)


def ours(tensors, kind):
    """The authors' tensors under our names: their experts are (expert, in, out)."""
    return {
        "query.weight": tensors[f"{kind}.q_proj.experts.w"].mT.flatten(0, 1),
        "output.weight": tensors[f"{kind}.q_proj.output_experts.w"].permute(2, 0, 1).flatten(1),
        "key.weight": tensors[f"{kind}.k_proj.weight"],
        "value.weight": tensors[f"{kind}.v_proj.weight"],
        "router.weight": tensors[f"{kind}.q_proj.w_gate"].T,
    }


def authors_layer(kept, **options):
    layer = MixtureOfAttentionHeads(
        16, heads=6, active_heads=3, head_dim=4, renormalize=False, dtype=torch.float64, **options
    )
    layer.load_state_dict(ours(kept, "weight"))
    return layer


@pytest.mark.parametrize("case", ["plain", "causal"])
def test_outputs_and_gradients_are_those_of_the_authors_layer(kept, case):
    layer = authors_layer(kept, causal=case == "causal")
    x = kept["x"].clone().requires_grad_()
    out = layer(x)
    assert_close(out, kept[f"{case}.out"], rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(out, [x, *layer.parameters()], kept[f"{case}.seed"])
    assert_close(found[0], kept[f"{case}.grad.x"], rtol=1e-10, atol=1e-12)
    if case == "causal":
        wanted = ours(kept, "causal.grad")
        for (name, _), grad in zip(layer.named_parameters(), found[1:], strict=True):
            assert_close(grad, wanted[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("loss", "name"), [(balance_loss, "switchloss"), (z_loss, "zloss")])
def test_losses_and_their_gradients_are_the_authors(kept, loss, name):
    layer = authors_layer(kept)
    found = loss(layer.routing(kept["x"]))
    assert_close(found, kept[name], rtol=1e-12, atol=0)
    (grad,) = torch.autograd.grad(found, layer.router.weight)
    assert_close(grad, kept[f"{name}.grad"].T, rtol=1e-10, atol=1e-13)


def layer_of(**options):
    torch.manual_seed(0)
    layer = MixtureOfAttentionHeads(32, dtype=torch.float64, **options)
    torch.nn.init.normal_(layer.router.weight, std=0.3)
    return layer


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("renormalize", [False, True])
def test_output_equals_the_dense_formula(causal, renormalize):
    layer = layer_of(heads=8, active_heads=3, causal=causal, renormalize=renormalize)
    x = torch.randn(11, 32, dtype=torch.float64)
    probabilities = (x @ layer.router.weight.T).softmax(-1)
    weights = probabilities.where(probabilities >= probabilities.sort(-1).values[:, -3:-2], 0.0)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    key, value, total = x @ layer.key.weight.T, x @ layer.value.weight.T, 0
    for head in range(8):
        own = slice(4 * head, 4 * head + 4)
        scores = (x @ layer.query.weight[own].T) @ key.T / 2
        if causal:
            scores = scores + torch.full((11, 11), -torch.inf).triu(1)
        total = total + weights[:, head, None] * (scores.softmax(-1) @ value @ layer.output.weight[:, own].T)
    assert_close(layer(x[None])[0], total, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("causal", [False, True])
def test_all_heads_of_equal_probability_are_multi_query_attention(causal):
    layer = layer_of(heads=4, active_heads=4, causal=causal)
    torch.nn.init.zeros_(layer.router.weight)
    multi_query = MultiQueryAttention(32, heads=4, causal=causal, dtype=torch.float64)
    multi_query.load_state_dict({name: value for name, value in layer.state_dict().items() if "router" not in name})
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    assert_close(layer(x), multi_query(x) / 4)


@pytest.mark.parametrize("active", [1, 2, 8])
def test_a_forward_costs_the_chosen_heads(active):
    """Operations beside those of the router and the shared key and value grow with k, not with the number of heads."""
    flops = {}
    for heads in (8, 32):
        layer = MixtureOfAttentionHeads(64, heads=heads, active_heads=active, head_dim=8)
        torch.nn.init.normal_(layer.router.weight)
        x = torch.randn(1, 2048, 64)
        backend = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
        with torch.no_grad(), backend, FlopCounterMode(display=False) as count:
            layer(x)
        flops[heads] = count.get_total_flops() - 2 * 2048 * 64 * (heads + 2 * 8)
    chosen = 2 * active * 2048 * (2 * 64 * 8 + 2 * 2048 * 8)
    # Blocks that are not full cost up to one block for each head.
    for heads, found in flops.items():
        assert chosen <= found <= chosen + 2 * heads * 64 * 2 * 64 * 8


def test_a_step_reads_the_weights_of_the_chosen_heads_only():
    """One token of 8 of 32 heads: eight blocks of one pair each."""
    plan = Dispatch.of(torch.tensor([3, 31, 0, 7, 8, 30, 2, 11]), 32)
    assert plan.head.tolist() == [0, 2, 3, 7, 8, 11, 30, 31]


@pytest.mark.parametrize("heads", [[0] * 500, [4] * 500, list(range(5)) * 100, [0] * 3 + [2] * 497])
def test_every_pair_stands_once_in_a_block_of_its_head(heads):
    chosen = torch.tensor(heads)
    plan = Dispatch.of(chosen, 5)
    size = len(plan.pair) // len(plan.head)
    assert size > 1
    assert plan.slot.unique().numel() == len(heads)
    assert (plan.head[plan.slot // size] == chosen).all()
    assert (plan.pair[plan.slot] == torch.arange(500)).all()


def test_the_state_is_that_of_one_head():
    layer = layer_of(heads=8, causal=True)
    _, state = layer.step(torch.randn(2, 7, 32, dtype=torch.float64), layer.init_state(2))
    assert state.key.shape == state.value.shape == (2, 1, 7, 4)


def test_more_heads_leave_the_computation_of_a_token_as_it_was():
    """Parameters grow with E; what a token uses does not."""
    few, many = (MixtureOfAttentionHeads(32, heads=heads, active_heads=2, head_dim=8) for heads in (4, 64))
    grown = 60 * (2 * 32 * 8 + 32)
    assert sum(p.numel() for p in many.parameters()) - sum(p.numel() for p in few.parameters()) == grown
    x = torch.randn(1, 1, 32)
    torch.nn.init.normal_(many.router.weight)
    many(x).sum().backward()
    assert many.output.weight.grad.unflatten(1, (64, 8)).abs().amax((0, 2)).count_nonzero() == 2


def test_the_denominator_passes_no_gradient_in_training():
    layer = layer_of(heads=8, active_heads=1)
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    for training in (True, False):
        weights = layer.train(training).routing(x).weights
        assert_close(weights, torch.ones_like(weights))
        (grad,) = torch.autograd.grad(weights.sum(), layer.router.weight)
        assert bool(grad.abs().max() > 1e-3) is training


def test_the_balance_loss_is_one_where_routing_is_uniform_and_least_there():
    layer = layer_of(heads=8, active_heads=2)
    routing = layer.routing(torch.randn(1, 8, 32, dtype=torch.float64))
    ring = torch.arange(8)[None, :, None]
    spread = routing._replace(chosen=torch.cat([ring, (ring + 1) % 8], -1), logits=torch.zeros_like(routing.logits))
    assert_close(balance_loss(spread).item(), 1.0)
    crowded = routing._replace(
        chosen=torch.tensor([0, 1]).expand(1, 8, 2),
        logits=torch.tensor([9.0, 9.0, 0, 0, 0, 0, 0, 0], dtype=torch.float64).expand(1, 8, 8),
    )
    assert balance_loss(crowded) > 3.9


def test_tokens_that_do_not_count_leave_the_losses_alone():
    layer = layer_of(heads=8)
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    tokens = torch.arange(9) < torch.tensor([[9], [4]])
    alone = layer.routing(torch.cat([x[0], x[1, :4]])[None])
    for loss in (balance_loss, z_loss):
        assert_close(loss(layer.routing(x), tokens), loss(alone))


def test_a_mask_is_asked_of_all_heads_alike():
    layer, causal = layer_of(heads=8), layer_of(heads=8, causal=True)
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    assert_close(layer(x, mask=Causal()), causal(x))


@pytest.mark.parametrize("active", [0, 9])
def test_bad_numbers_of_heads_are_named(active):
    with pytest.raises(ValueError, match=f"MixtureOfAttentionHeads: active_heads {active} of heads 8"):
        layer_of(heads=8, active_heads=active)
