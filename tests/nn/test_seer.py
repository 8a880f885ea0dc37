"""SeerAttention against the authors' gate and dense target (golden), the formula, and its claim: the gate learns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from regard.nn import GroupedQueryAttention, MultiHeadAttention, SeerAttention
from regard.ops.masks import Padding
from regard.testing.checks.memory import peak_bytes

GOLDEN = Path(__file__).parents[1] / "golden" / "seer.safetensors"
BLOCK = 8


@pytest.fixture(scope="module")
def kept():
    return load_file(GOLDEN)


def authors_layer(kept, case, **options):
    """The authors' weights under our names: their one W_k serves a group, or there is no W_q."""
    layer = SeerAttention(
        16,
        heads=4,
        kv_heads=2,
        head_dim=8,
        causal=True,
        block_size=BLOCK,
        gate_dim=6 if case == "double" else 8,
        dtype=torch.float64,
        **options,
    )
    key = kept[f"{case}.weight.mask_linear_k.weight"]
    identity = torch.eye(8, dtype=torch.float64).expand(4, -1, -1)
    state = {
        "query.weight": kept["weight.query"],
        "key.weight": kept["weight.key"],
        "gate.query": kept.get(f"{case}.weight.mask_linear_q.weight", identity),
        "gate.key": key.repeat_interleave(4 // len(key), 0),
    }
    layer.load_state_dict({**layer.state_dict(), **state})
    return layer


@pytest.mark.parametrize("case", ["double", "single"])
def test_scores_loss_and_its_gradients_are_those_of_the_authors_gate(kept, case):
    layer = authors_layer(kept, case)
    assert_close(layer.gate_scores(kept["x"], query_block=BLOCK), kept[f"{case}.scores"], rtol=1e-12, atol=1e-13)
    loss = layer.distillation_loss(kept["x"], query_block=BLOCK)
    blocks = kept["target"].shape[-1]  # PyTorch's mean divides a sum over blocks by their number as well
    assert_close(loss, blocks * kept[f"{case}.loss"], rtol=1e-12, atol=0)
    grad_query, grad_key = torch.autograd.grad(loss / blocks, [layer.gate.query, layer.gate.key])
    if case == "double":
        grad_key = grad_key.unflatten(0, (2, 2)).sum(1)
        assert_close(grad_query, kept["double.grad.mask_linear_q.weight"], rtol=1e-10, atol=1e-13)
    assert_close(grad_key, kept[f"{case}.grad.mask_linear_k.weight"], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("case", ["double", "single"])
def test_blocks_above_the_threshold_are_the_authors_and_the_own(kept, case):
    layer = authors_layer(kept, case, threshold=0.3)
    visits = layer.chosen(layer.heads_of(kept["x"], None, None, None), BLOCK).visits
    assert torch.equal(visits, kept[f"{case}.chosen"] | torch.eye(visits.shape[-1], dtype=torch.bool))
    assert not torch.equal(visits, kept[f"{case}.chosen"])


def test_the_target_is_the_authors_pooled_map(kept):
    layer = authors_layer(kept, "double")
    assert_close(layer.pooled_map(kept["x"], query_block=BLOCK), kept["target"], rtol=1e-12, atol=1e-14)
    rows, blocks = torch.arange(29)[:, None], torch.arange(4)
    pooled = kept["pooled_1d"] * (blocks * BLOCK + BLOCK <= rows + 1)
    pooled = pooled / pooled.sum(-1, keepdim=True).clamp(min=1e-300)
    assert_close(layer.pooled_map(kept["x"], query_block=1), pooled, rtol=1e-12, atol=1e-14)


def layer_of(block_size=4, **options):
    torch.manual_seed(0)
    return SeerAttention(32, heads=4, block_size=block_size, dtype=torch.float64, **options)


def inputs(length=22, batch=2):
    return torch.randn(batch, length, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def dense_output(layer, x, rows):
    """The whole layer with an n × n mask made from the gate's scores."""
    scores, (size, length) = layer.gate_scores(x, query_block=rows), (layer.block_size, x.shape[1])
    scores = scores.detach().repeat_interleave(rows, 2)[:, :, :length]
    token = torch.arange(length)
    block = torch.arange(scores.shape[-1])
    own = (token // size)[:, None] == block
    if layer.top_k is None:
        reads = (scores >= layer.threshold) & (scores > 0) | own
    else:
        ranks = scores.masked_fill(own, 2.0).argsort(-1, descending=True).argsort(-1)
        reads = (ranks < layer.top_k) & (scores > 0) | own
    allowed = reads.repeat_interleave(size, -1)[..., :length]
    allowed = allowed.tril() if layer.causal else allowed
    heads = layer.heads_of(x, None, None, None)
    query, key = (layer.turned(part, heads.places) for part in heads[:2])
    key, value = (part.repeat_interleave(4 // layer.kv_heads, 1) for part in (key, heads.value))
    weights = (query @ key.mT / 8**0.5).masked_fill(~allowed, -torch.inf).softmax(-1)
    return layer.output((weights @ value).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("choice", [{"top_k": 2}, {"threshold": 0.25}])
@pytest.mark.parametrize("options", [{}, {"kv_heads": 2, "gate_dim": 6}, {"position": None}])
def test_output_equals_the_dense_formula(choice, options):
    x = inputs()
    everywhere, causal = layer_of(**choice, **options), layer_of(causal=True, **choice, **options)
    assert_close(everywhere(x), dense_output(everywhere, x, 4))
    assert_close(causal(x), dense_output(causal, x, 1))
    assert_close(causal.prefill(x)[0], dense_output(causal, x, 4))


@pytest.mark.parametrize("block_size", [4, 64])
def test_long_sequences_with_gradients_equal_the_dense_formula(block_size):
    """Beyond what is computed with a dense mask: chosen blocks are walked one by one."""
    x = inputs(330).requires_grad_()
    layer = layer_of(block_size, top_k=2, causal=True)
    for found, rows in ((layer(x), 1), (layer.prefill(x)[0], block_size)):
        wanted = dense_output(layer, x, rows)
        assert_close(found, wanted)
        assert_close(*(torch.autograd.grad(out.sin().sum(), x)[0] for out in (found, wanted)))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("options", [{"top_k": 6}, {"threshold": 0.0}])
def test_all_blocks_equal_dense_attention(causal, options):
    torch.manual_seed(0)
    grouped = GroupedQueryAttention(32, heads=4, causal=causal, position="rotary", bias=True, dtype=torch.float64)
    torch.nn.init.normal_(grouped.query.bias)
    layer = SeerAttention.from_attention(grouped, block_size=4, **options)
    x = inputs()
    assert_close(layer(x), grouped(x))
    assert_close(layer.caught(x), torch.ones(2, 4, 22, dtype=torch.float64))
    assert layer.query is grouped.query
    if causal:
        assert_close(layer.prefill(x)[0], grouped(x))


def test_one_block_a_row_is_attention_within_blocks():
    layer = layer_of(top_k=1)
    x = inputs(20)
    together = layer(x)
    apart = layer(x.view(-1, 4, 32)).view_as(x)
    assert_close(together, apart)


def test_decoding_goes_on_from_a_prompt():
    layer = layer_of(top_k=2, causal=True)
    x = inputs()
    _, state = layer.prefill(x[:, :18])
    again, _ = layer.step(x[:, :18], layer.init_state(2))
    rest, _ = layer.step(x[:, 18:], state)
    assert_close(torch.cat([again, rest], 1), layer(x))


def test_only_a_prompt_shows_a_block_its_later_tokens():
    layer = layer_of(top_k=2, causal=True)
    x = inputs(40, batch=8)
    other = x.clone()
    other[:, 39] = inputs(1, batch=8)[:, 0] * 5
    assert torch.equal(layer(x)[:, :39], layer(other)[:, :39])
    before, after = layer.prefill(x)[0], layer.prefill(other)[0]
    assert torch.equal(before[:, :36], after[:, :36])
    assert not torch.allclose(before[:, 36:39], after[:, 36:39])


@pytest.mark.parametrize("options", [{}, {"causal": True}])
def test_padding_takes_no_part_in_scores_and_loss(options):
    layer, x = layer_of(**options), inputs()
    mask = Padding(torch.tensor([13, 22]))
    for rows in (4, 1) if options else (4,):
        alone = [layer.distillation_loss(part, query_block=rows) for part in (x[:1, :13], x[1:])]
        counted = torch.tensor([13 - 3, 22 - 3] if rows == 1 else [4, 6])
        together = layer.distillation_loss(x, mask=mask, query_block=rows)
        assert_close(together, (torch.stack(alone) * counted).sum() / counted.sum())
        part = layer.gate_scores(x[:1, :13], query_block=rows)
        whole = layer.gate_scores(x, mask=mask, query_block=rows)[:1, :, : part.shape[2], : part.shape[3]]
        assert_close(whole, part)


def test_the_pooled_map_is_never_dense():
    layer = SeerAttention(8, heads=1, causal=True, position=None)
    for rows in (64, 1):
        x = torch.randn(1, 2048, 8)
        assert peak_bytes(lambda x=x, rows=rows: layer.distillation_loss(x, query_block=rows)) < 2048 * 2048 * 4 / 4


CENTRES = 2 * torch.randn(6, 32, generator=torch.Generator().manual_seed(0))


def topics(batch, blocks=16):
    """Sequences whose blocks are each about one of six topics."""
    about = torch.randint(6, (batch, blocks)).repeat_interleave(BLOCK, 1)
    return CENTRES[about] + torch.randn(batch, blocks * BLOCK, 32)


def looks_for_the_next_topic(causal):
    """A layer whose queries look for keys of the topic after their own: almost never those of their block."""
    base = MultiHeadAttention(32, heads=2, causal=causal)
    with torch.no_grad():
        base.query.weight.copy_(torch.linalg.lstsq(CENTRES, CENTRES.roll(-1, 0)).solution.T)
        base.key.weight.copy_(torch.eye(32))
    return base


@pytest.mark.parametrize(("causal", "rows"), [(False, BLOCK), (True, BLOCK), (True, 1)])
def test_a_distilled_gate_finds_the_blocks_that_matter(causal, rows):
    torch.manual_seed(0)
    base = looks_for_the_next_topic(causal)
    layer = SeerAttention.from_attention(base, block_size=BLOCK, top_k=5)
    frozen = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    held_out = topics(8)

    def loss_and_caught():
        # The mass is counted where there are more blocks than may be read.
        caught = layer.caught(held_out, query_block=rows)[..., 8 * BLOCK :].mean()
        return float(layer.distillation_loss(held_out, query_block=rows).detach()), float(caught)

    random = []
    for _ in range(4):
        for weight in layer.gate.parameters():
            torch.nn.init.normal_(weight, std=0.2)
        random.append(loss_and_caught())
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        layer.distillation_loss(topics(8), query_block=rows).backward()
        optimizer.step()
    loss, caught = loss_and_caught()
    assert loss < 0.2 * min(before for before, _ in random)
    assert caught > 0.9 > 3 * max(before for _, before in random)
    for name, tensor in base.state_dict().items():
        assert torch.equal(tensor, frozen[name])


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="top_k 2 and threshold"):
        SeerAttention(32, top_k=2, threshold=0.1)
    with pytest.raises(ValueError, match="alibi"):
        SeerAttention.from_attention(MultiHeadAttention(32, position="alibi"))
    with pytest.raises(ValueError, match="context_dim 24"):
        SeerAttention.from_attention(MultiHeadAttention(32, context_dim=24))
    with pytest.raises(ValueError, match="not a plain layer"):
        SeerAttention.from_attention(torch.nn.Linear(32, 32))
    with pytest.raises(ValueError, match="causal=False"):
        layer_of().prefill(inputs())
    with pytest.raises(ValueError, match="query_block 3"):
        layer_of().gate_scores(inputs(), query_block=3)
