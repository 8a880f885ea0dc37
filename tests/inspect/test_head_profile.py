"""Head profiles: distances counted by hand, patterns that are known, and the heads of a pretrained BERT."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from regard.inspect.attention_sinks import attention_sinks
from regard.inspect.head_profile import HeadProfile, attention_patterns, head_profile
from regard.sites import AttentionCall, attach
from regard.sites.call import Heads, RowChange
from tests.inspect.pretrained_bert import load, sentences
from tests.sites.families import FAMILIES


def tiny(name: str, *, without: str = "") -> nn.Module:
    torch.manual_seed(0)
    model = FAMILIES[name].build().eval()
    for part, weight in model.named_parameters():
        if without and without in part:
            nn.init.zeros_(weight)
    return model


def ids(length: int = 6, batch: int = 2) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, 90, (batch, length), generator=torch.Generator().manual_seed(2))}


def pixels(batch: int = 2) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))}


def previous_token(call: AttentionCall) -> AttentionCall:
    def change(weights: Tensor, rows: slice, heads: Heads) -> Tensor:
        before = torch.eye(call.queries, call.keys).roll(-1, 1).tril()
        before[0, 0] = 1.0
        return before[rows].expand_as(weights)

    return call.change_weights(RowChange(torch.ones(call.queries, dtype=torch.bool), change))


def test_strength_of_text_counts_the_pairs_at_each_distance():
    found = head_profile(tiny("BERT", without="query"), ids(), patterns=2)
    pairs = torch.tensor([6, 10, 8, 6, 4, 2]) / 36
    for strength in found.strength:
        torch.testing.assert_close(strength, pairs.expand(4, -1))


def test_strength_of_images_counts_hops_between_patches():
    found = head_profile(tiny("ViT", without="q_proj"), pixels(), grid=(4, 4), patterns=2)
    places = [(row, column) for row in range(4) for column in range(4)]
    hops = Counter(max(abs(a - c), abs(b - d)) for a, b in places for c, d in places)
    by_hand = torch.tensor([hops[hop] / (16 * 17) for hop in range(4)])
    torch.testing.assert_close(found.strength[0], by_hand.expand(4, -1))
    torch.testing.assert_close(found.special[0], torch.full((4,), 1 / 17))


def test_a_head_on_the_token_before_is_one_away():
    model = tiny("Llama")
    with attach(model, previous_token):
        found = head_profile(model, ids(), patterns=1)
    torch.testing.assert_close(found.distance(1), torch.full((4,), 5 / 6))


def test_strength_and_special_tokens_share_all_attention():
    found = head_profile(tiny("ViT"), pixels(), grid=(4, 4), patterns=2)
    for strength, special in zip(found.strength, found.special, strict=True):
        torch.testing.assert_close(strength.sum(1) + special, torch.ones(4))


def test_padding_is_left_out():
    model, alone = tiny("BERT"), ids(5, 1)
    padded = {"input_ids": nn.functional.pad(alone["input_ids"], (0, 3))}
    padded["attention_mask"] = (padded["input_ids"] > 0).long()
    short, long = head_profile(model, alone, patterns=2), head_profile(model, padded, patterns=2)
    for one, other in zip(short.strength, long.strength, strict=True):
        torch.testing.assert_close(other[:, :5], one)
        assert other[:, 5:].abs().max() == 0
    torch.testing.assert_close(long.patterns.centers, short.patterns.centers, rtol=1e-3, atol=1e-4)


def made_up() -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(5)
    kinds = torch.arange(60) % 3
    column = torch.zeros(8, 8)
    column[:, 0] = 1.0
    clean = torch.stack([torch.eye(8), column, torch.full((8, 8), 1 / 8)])
    return clean[kinds] + 0.05 * torch.rand(60, 8, 8, generator=random), kinds


def test_known_patterns_are_found():
    maps, kinds = made_up()
    found = attention_patterns(maps, patterns=3)
    assert len({(kind, cluster) for kind, cluster in zip(kinds.tolist(), found.cluster.tolist(), strict=True)}) == 3
    assert found.error < 0.2
    assert found.centers.shape == (3, 8, 8)


def test_patterns_are_those_of_the_seed_and_leave_the_process_alone():
    maps, _ = made_up()
    state = torch.get_rng_state()
    first, again, other = (attention_patterns(maps, patterns=3, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.latent, again.latent)
    assert torch.equal(first.cluster, again.cluster)
    assert not torch.equal(first.latent, other.latent)


def test_larger_clusters_come_first():
    maps, kinds = made_up()
    found = attention_patterns(torch.cat([maps, maps[kinds == 1], maps[kinds == 1], maps[kinds == 0]]), patterns=3)
    assert torch.bincount(found.cluster).tolist() == [60, 40, 20]


def test_importance_is_that_of_the_loss():
    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(**batch)[0].sin().mean((1, 2))

    found = head_profile(tiny("ViT"), pixels(), grid=(4, 4), patterns=2, loss=loss)
    assert found.importance is not None
    assert found.importance.ablation is not None
    assert [len(changes) for changes in found.importance.ablation] == [4, 4]
    assert [str(column.header) for column in found.table().columns][-1] == "most important"


def test_timm_vision_transformer_is_read():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=3).eval()
    found = head_profile(model, {"x": pixels()["pixel_values"]}, grid=(4, 4), patterns=2)
    assert [strength.shape for strength in found.strength] == [(3, 4)] * 2
    torch.testing.assert_close(found.strength[0].sum(1) + found.special[0], torch.ones(3))


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"grid \(5, 5\) and 17 tokens at .*; give the rows and columns"):
        head_profile(tiny("ViT"), pixels(), grid=(5, 5))
    with pytest.raises(ValueError, match="5 patterns of 3 maps; give fewer"):
        attention_patterns(torch.rand(3, 4, 4), patterns=5)


@pytest.fixture(scope="module")
def bert_profile() -> HeadProfile:
    model, tokenizer = load()
    return head_profile(model, dict(tokenizer(sentences()[:8], padding=True, return_tensors="pt")), patterns=4)


def test_heads_of_pretrained_bert_with_sinks_share_a_pattern(bert_profile: HeadProfile):
    model, tokenizer = load()
    sinks = attention_sinks(model, dict(tokenizer(sentences()[:8], padding=True, return_tensors="pt")))
    strong = torch.stack([layer.received[:, :, 0].mean(0) > 0.6 for layer in sinks.layers])
    patterns = torch.stack(bert_profile.heads)
    number = int(patterns[strong].mode().values)
    assert strong.sum() > 10
    assert (patterns[strong] == number).double().mean() > 0.7
    assert (patterns[strong] == number).double().mean() > 1.5 * (patterns[~strong] == number).double().mean()
    assert bert_profile.patterns.centers[number].mean(0).argmax() == 0


def test_result_prints_and_plots(bert_profile: HeadProfile):
    assert bert_profile.table().row_count == 6
    assert len(bert_profile.figure().data) == 6 + 2 + 4
