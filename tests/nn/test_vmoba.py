"""VMoBA: the authors' numbers, the equations, three ways to cut a video, and queries that compete."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from regard.nn import MultiHeadAttention, VideoMixtureOfBlock
from regard.nn.sparse.vmoba import cut, least_that_reach
from regard.ops import attention

GOLDEN = Path(__file__).parents[1] / "golden" / "vmoba.safetensors"
SIZES = {"temporal_block": 2, "spatial_block": (2, 3), "video_block": (2, 2, 2)}


def vmoba(layer: int = 0, **changes: object) -> VideoMixtureOfBlock:
    torch.manual_seed(0)
    given = {"heads": 2, "layer": layer, **SIZES, "dtype": torch.float64, **changes}
    return VideoMixtureOfBlock(8, **given).eval()  # pyright: ignore[reportArgumentType]


def video(*grid: int) -> Tensor:
    return torch.randn(2, *grid, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def block_of(layer: int, place: tuple[int, int, int]) -> tuple[int, ...]:
    """The paper's partition of a position (t, h, w)."""
    (t, h, w), (a, b, c) = place, SIZES["video_block"]
    return [
        (t // SIZES["temporal_block"],),
        (h // SIZES["spatial_block"][0], w // SIZES["spatial_block"][1]),
        (t // a, h // b, w // c),
    ][layer % 3]


def visited(layer: VideoMixtureOfBlock, which: int, query: Tensor, key: Tensor, places: list) -> Tensor:
    """Which keys the queries of one head visit, chosen one pair at a time."""
    names = [block_of(which, place) for place in places]
    blocks = sorted(set(names))
    own = torch.tensor([blocks.index(name) for name in names])
    means = torch.stack([key[own == c].mean(0) for c in range(len(blocks))])
    scores = (query @ means.T).detach()
    weights = (scores - scores.min()) / (scores.max() - scores.min())
    chosen = [(i, int(c)) for i, c in enumerate(own)]
    others = [(i, c) for i in range(len(own)) for c in range(len(blocks)) if c != own[i]]
    others.sort(key=lambda pair: -weights[pair])
    if layer.top_k is not None:
        chosen += others[: (layer.top_k - 1) * len(own)]
    else:
        reached = sum(weights[pair] for pair in chosen)
        while reached < layer.threshold * weights.sum():
            chosen.append(others.pop(0))
            reached = reached + weights[chosen[-1]]
    map_ = torch.zeros_like(weights, dtype=torch.bool)
    map_[tuple(zip(*chosen, strict=True))] = True
    return map_[:, own]


def by_definition(layer: VideoMixtureOfBlock, which: int, x: Tensor) -> Tensor:
    """The docstring's equations with an n × n mask for each sample and head."""
    grid = x.shape[1:4]
    places = [tuple(place) for place in torch.cartesian_prod(*(torch.arange(size) for size in grid)).tolist()]
    parts = (
        part(x.flatten(1, 3)).unflatten(-1, (2, -1)).transpose(1, 2) for part in (layer.query, layer.key, layer.value)
    )
    query, key, value = parts
    masks = [
        [visited(layer, which, q, k, places) for q, k in zip(*of, strict=True)] for of in zip(query, key, strict=True)
    ]
    allowed = torch.stack([torch.stack(row) for row in masks])
    scores = (query @ key.mT * layer.head_dim**-0.5).masked_fill(~allowed, -torch.inf)
    return layer.output((scores.softmax(-1) @ value).transpose(1, 2).flatten(2)).view_as(x)


@pytest.mark.parametrize("grid", [(4, 4, 6), (3, 5, 4), (1, 1, 1), (1, 3, 7)], ids=str)
@pytest.mark.parametrize("which", [0, 1, 2, 4])
@pytest.mark.parametrize("options", [{"threshold": 0.5}, {"threshold": 0.9}, {"top_k": 2}], ids=str)
def test_outputs_and_gradients_are_the_equations(which, grid, options):
    layer, x = vmoba(which, **options), video(*grid).requires_grad_()
    found, wanted = layer(x), by_definition(layer, which, x)
    assert_close(found, wanted)
    leaves = [x, *layer.parameters()]
    assert_close(*(torch.autograd.grad(out.sin().sum(), leaves) for out in (found, wanted)))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("0", {"layer": 0, "temporal_block": 3, "threshold": 0.7}),
        ("1", {"layer": 1, "spatial_block": (2, 2), "threshold": 0.5}),
        ("2", {"layer": 2, "video_block": (2, 2, 2), "threshold": 0.4}),
        ("top_k", {"layer": 5, "video_block": (2, 2, 2), "top_k": 2}),
    ],
)
def test_the_authors_code_gives_the_same_numbers(name, options):
    kept = load_file(GOLDEN)
    layer = vmoba(**options)
    layer.load_state_dict({f"{part}.weight": kept[f"weight.{part}"] for part in ("query", "key", "value", "output")})
    x = kept["x"].requires_grad_()
    out = layer(x)
    assert_close(out, kept[f"{name}.out"])
    if name == "top_k":
        return
    grads = torch.autograd.grad(out, [x, *layer.parameters()], kept["seed"])
    names = ["x", *(f"weight.{part.removesuffix('.weight')}" for part, _ in layer.named_parameters())]
    for part, grad in zip(names, grads, strict=True):
        assert_close(grad, kept[f"{name}.grad.{part}"])


@pytest.mark.parametrize("options", [{"threshold": 1.0}, {"top_k": 99}, {"video_block": (9, 9, 9)}], ids=str)
def test_with_everything_chosen_it_is_full_attention(options):
    full = MultiHeadAttention(8, heads=2, dtype=torch.float64)
    layer, x = vmoba(2, **options), video(3, 4, 5)
    full.load_state_dict(layer.state_dict())
    assert_close(layer(x), full(x.flatten(1, 3)).view_as(x))


def test_layers_cut_in_time_then_space_then_both():
    """21 × 20 × 32 patches make 7, 40 and 60 blocks, and in turn again."""
    for layer, (blocks, size) in enumerate([(7, 1920), (40, 336), (60, 224)] * 2):
        tokens, own = cut((21, 20, 32), VideoMixtureOfBlock(8, layer=layer).block, torch.device("cpu"))
        assert tokens.shape == (blocks, size)
        assert_close(tokens.flatten().sort().values, torch.arange(21 * 20 * 32))
        assert (own[tokens] == torch.arange(blocks)[:, None]).all()


def test_queries_of_a_head_compete_for_its_blocks():
    """The claim: a query that is like many blocks visits many, others their own alone; MoBA gives all the same."""
    layer = vmoba(0, temporal_block=1, heads=1, threshold=0.5)
    query, key = torch.zeros(1, 1, 60, 8, dtype=torch.float64), torch.zeros(1, 1, 60, 8, dtype=torch.float64)
    key[..., 0], key[..., 1] = 1.0, torch.randn(60, dtype=torch.float64) * 0.1
    query[..., 0] = -1.0
    query[..., :6, 0] = 1.0
    tokens, own = cut((6, 2, 5), layer.block, key.device)
    visits = layer.route(query, key, tokens >= 0, own).visits[0, 0]
    assert (visits[:6].sum(-1) > 2).all()
    assert (visits[10:].sum(-1) == 1).all()
    layer.top_k = 2
    assert layer.route(query, key, tokens >= 0, own).visits.sum() == 120


def test_a_concentrated_head_visits_fewer_pairs():
    """At the same share of similarity: one head whose queries are all somewhat like the blocks, one where four are."""
    layer, tokens = vmoba(0, temporal_block=1, threshold=0.5), torch.arange(64).view(16, 4)
    query, key = torch.zeros(1, 2, 64, 4, dtype=torch.float64), torch.zeros(1, 2, 64, 4, dtype=torch.float64)
    key[..., 0] = torch.linspace(1.0, 1.1, 16, dtype=torch.float64).repeat_interleave(4)
    query[:, 0, :, 0] = torch.linspace(0.0, 1.0, 64, dtype=torch.float64)
    query[:, 1, ::16, 0] = 1.0
    spread, concentrated = layer.route(query, key, tokens >= 0, torch.arange(64) // 4).visits.sum((-2, -1))[0].tolist()
    assert spread > 300
    # Every query its own block, and half of what the four are like.
    assert 64 + 20 < concentrated < 64 + 40


@pytest.mark.parametrize("pairs", [1, 2, 9, 5000])
@pytest.mark.parametrize("share", [1e-4, 0.3, 0.99])
def test_the_largest_weights_down_to_the_least_reach_the_share_and_without_it_do_not(pairs, share):
    weights = torch.rand(3, 2, pairs, generator=torch.Generator().manual_seed(2))
    weights[0], weights[..., 0] = weights[0].round(decimals=1), 1.0
    wanted = share * weights.sum(-1, keepdim=True)
    least = least_that_reach(weights, wanted)
    assert (weights == least).any(-1).all()
    assert ((weights * (weights >= least)).sum(-1, keepdim=True) >= wanted * (1 - 1e-6)).all()
    assert ((weights * (weights > least)).sum(-1, keepdim=True) < wanted * (1 + 1e-6)).all()
    assert (least_that_reach(weights, -wanted) == torch.inf).all()


def test_a_trained_layer_is_converted_and_its_threshold_set_anew():
    full = MultiHeadAttention(8, heads=2, bias=True, dtype=torch.float64)
    layer, x = VideoMixtureOfBlock.from_multi_head(full, index=2, video_block=(2, 2, 2), threshold=0.3), video(4, 4, 4)
    wanted = full(x.flatten(1, 3)).view_as(x)
    assert (layer(x) - wanted).abs().amax() > 1e-3
    layer.threshold = 1.0
    assert_close(layer(x), wanted)
    with pytest.raises(ValueError, match="causal=True"):
        VideoMixtureOfBlock.from_multi_head(MultiHeadAttention(8, heads=2, causal=True), index=0)


def test_heads_of_a_model_with_positions_go_through_attend():
    layer = vmoba(1, threshold=1.0)
    query, key, value = torch.randn(3, 2, 2, 24, 4, dtype=torch.float64)
    assert_close(layer.attend(query, key, value, (2, 3, 4)), attention(query, key, value))
    with pytest.raises(ValueError, match="grid"):
        layer.attend(query, key, value, (2, 3, 5))


def test_sizes_that_make_no_blocks_are_refused():
    for name, size in (("temporal_block", 0), ("spatial_block", (2,)), ("video_block", (2, 0, 2)), ("top_k", 0)):
        with pytest.raises(ValueError, match=f"VideoMixtureOfBlock: {name} "):
            vmoba(**{name: size})
    for threshold in (0.0, 1.5):
        with pytest.raises(ValueError, match=f"threshold {threshold}"):
            vmoba(threshold=threshold)
    with pytest.raises(ValueError, match="layer -1"):
        vmoba(-1)
