"""Head embeddings: the paper's formula and parameter counts, and what is left without them."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from regard.nn import HeadEmbeddingAttention, MultiHeadAttention, MultiQueryAttention

HEADS, WIDTH = 4, 6
DIM = HEADS * WIDTH


def layer_of(**options):
    torch.manual_seed(0)
    layer = HeadEmbeddingAttention(DIM, heads=HEADS, dtype=torch.float64, **options)
    with torch.no_grad():
        for embedding in (layer.query_embedding, layer.key_embedding, layer.value_embedding):
            embedding.normal_()
    return layer


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("embedding", ["multiply", "add"])
def test_output_equals_the_papers_formula(embedding, causal):
    layer = layer_of(embedding=embedding, causal=causal)
    x = torch.randn(9, DIM, dtype=torch.float64)
    psi = {"multiply": lambda shared, vector: shared * (vector + 1), "add": lambda shared, vector: shared + vector}
    heads = []
    for head in range(HEADS):
        query, key, value = (
            psi[embedding](x @ projection.weight.T, vectors[head])
            for projection, vectors in (
                (layer.query, layer.query_embedding),
                (layer.key, layer.key_embedding),
                (layer.value, layer.value_embedding),
            )
        )
        scores = query @ key.T / WIDTH**0.5
        if causal:
            scores += torch.full((9, 9), -torch.inf).triu(1)
        heads.append(scores.softmax(-1) @ value)
    assert_close(layer(x[None])[0], torch.cat(heads, -1) @ layer.output.weight.T, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("heads", "width"), [(12, 64), (4, 6), (1, 8)])
def test_parameters_are_as_many_as_the_paper_counts(heads, width):
    """Queries, keys and values: 3nd more than a single head; multi-head has (3n² − 3n)d² − 3nd more than that."""

    def inner(layer):
        return sum(p.numel() for name, p in layer.named_parameters() if not name.startswith("output"))

    dim = heads * width
    ours = inner(HeadEmbeddingAttention(dim, heads=heads, device="meta"))
    single = inner(MultiHeadAttention(dim, heads=1, head_dim=width, device="meta"))
    multi_head = inner(MultiHeadAttention(dim, heads=heads, device="meta"))
    assert ours - single == 3 * heads * width
    assert multi_head - ours == (3 * heads**2 - 3 * heads) * width**2 - 3 * heads * width


@pytest.mark.parametrize("embedding", ["multiply", "add"])
def test_heads_are_told_apart_by_their_embeddings_alone(embedding):
    layer = layer_of(embedding=embedding)
    weights, value = layer.attention_map(torch.randn(1, 7, DIM, dtype=torch.float64))
    assert (weights[:, 0] - weights[:, 1]).abs().max() > 1e-3
    with torch.no_grad():
        for vectors in (layer.query_embedding, layer.key_embedding, layer.value_embedding):
            vectors.zero_()
    weights, value = layer.attention_map(torch.randn(1, 7, DIM, dtype=torch.float64))
    assert_close(weights, weights[:, :1].expand_as(weights))
    assert_close(value, value[:, :1].expand_as(value))


def test_added_embeddings_are_multi_query_attention_with_biases():
    """e^Q is a bias of every query head, e^V one of the output, and e^K cancels in the softmax."""
    layer = layer_of(embedding="add")
    peer = MultiQueryAttention(DIM, heads=HEADS, bias=True, dtype=torch.float64)
    state = {
        "query.weight": layer.query.weight.repeat(HEADS, 1),
        "query.bias": layer.query_embedding.flatten(),
        "key.weight": layer.key.weight,
        "key.bias": torch.zeros(WIDTH, dtype=torch.float64),
        "value.weight": layer.value.weight,
        "value.bias": torch.zeros(WIDTH, dtype=torch.float64),
        "output.weight": layer.output.weight,
        "output.bias": layer.output.weight @ layer.value_embedding.flatten(),
    }
    peer.load_state_dict(state)
    x = torch.randn(2, 9, DIM, dtype=torch.float64)
    assert_close(layer(x), peer(x))


def test_multiplied_embeddings_weigh_the_features_of_a_score_by_head():
    layer = layer_of()
    x = torch.randn(1, 7, DIM, dtype=torch.float64)
    weights, _ = layer.attention_map(x)
    metric = (layer.query_embedding + 1) * (layer.key_embedding + 1)
    scores = torch.einsum("bid,hd,bjd->bhij", layer.query(x), metric, layer.key(x)) / WIDTH**0.5
    assert_close(weights, scores.softmax(-1))


def test_another_embedding_is_refused():
    with pytest.raises(ValueError, match="HeadEmbeddingAttention: embedding 'mul' is not known; valid values"):
        HeadEmbeddingAttention(DIM, embedding="mul")
