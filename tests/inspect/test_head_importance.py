"""Head importance: gradients against finite differences, pruning, and removal that equals masking."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from regard.inspect.head_importance import head_importance, prune_heads, remove_heads, without_heads
from regard.sites import AttentionCall, attach, find
from tests.inspect.pretrained_bert import load, sentences
from tests.sites.families import FAMILIES


def tiny(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = FAMILIES[name].build().double().eval()
    # Transformers' own initialisation is so small that heads hardly differ.
    for weight in model.parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, std=0.4 / weight.shape[-1] ** 0.25)
    return model


def ids(batch: int, seed: int = 2) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, 90, (batch, 6), generator=torch.Generator().manual_seed(seed))}


def per_sample(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch)[0].sin().mean((1, 2))


def whole(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return per_sample(model, batch).mean()


@pytest.fixture(scope="module")
def bert() -> nn.Module:
    return tiny("BERT")


def scaled(model: nn.Module, batch: dict[str, Tensor], site: str, head: int, factor: float) -> Tensor:
    def scale(output: Tensor) -> Tensor:
        factors = torch.ones(output.shape[1], dtype=output.dtype)
        factors[head] = factor
        return output * factors[:, None, None]

    def instrument(call: AttentionCall) -> AttentionCall:
        return call.change_output(scale) if call.site.name == site else call

    with torch.no_grad(), attach(model, instrument):
        return per_sample(model, batch)


@pytest.mark.parametrize("name", ["BERT", "GPT-2"])
def test_importance_is_the_mean_absolute_derivative_by_a_gate(name: str):
    model, batch, step = tiny(name), ids(3), 1e-4
    found = head_importance(model, [batch], per_sample, normalize=False)
    for site, scores in zip(found.sites, found.scores, strict=True):
        for head in range(4):
            more, less = (scaled(model, batch, site.name, head, 1 + sign * step) for sign in (1, -1))
            assert scores[head].item() == pytest.approx(((more - less) / (2 * step)).abs().mean().item(), rel=1e-5)


def test_a_loss_linear_in_the_heads_changes_by_their_importance(bert: nn.Module):
    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        mixed: list[Tensor] = []
        hook = model.get_submodule("encoder.layer.1.attention.output.dense").register_forward_hook(
            lambda *each: mixed.append(each[2])
        )
        model(**batch)
        hook.remove()
        return mixed[0].sum()

    found = head_importance(bert, [ids(1)], loss, normalize=False, ablate=True)
    assert found.ablation is not None
    torch.testing.assert_close(found.scores[1], found.ablation[1].abs())


def test_samples_of_a_batch_count_as_batches_of_their_own(bert: nn.Module):
    together = head_importance(bert, [ids(3)], per_sample).scores
    rows = [{"input_ids": row[None]} for row in ids(3)["input_ids"]]
    apart, mixed = head_importance(bert, rows, whole).scores, head_importance(bert, [ids(3)], whole).scores
    torch.testing.assert_close(together, apart)
    assert (together[0] - mixed[0]).abs().max() > 1e-3


def test_sequences_of_a_pair_share_their_gates(bert: nn.Module):
    def difference(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(**batch)[0].sin().mean((1, 2)).unflatten(0, (-1, 2)).diff(dim=1).squeeze(1)

    same = {"input_ids": ids(2)["input_ids"].repeat_interleave(2, 0)}
    found = head_importance(bert, [same], difference, normalize=False)
    assert torch.cat(found.scores).max() < 1e-12
    assert torch.cat(head_importance(bert, [ids(4)], difference, normalize=False).scores).min() > 1e-6


def test_scores_of_a_layer_have_norm_one(bert: nn.Module):
    found = head_importance(bert, [ids(2)], per_sample)
    plain = head_importance(bert, [ids(2)], per_sample, normalize=False)
    for scores, raw in zip(found.scores, plain.scores, strict=True):
        torch.testing.assert_close(scores, raw / raw.square().sum().sqrt())


def test_ablation_is_the_loss_without_the_head_less_the_whole(bert: nn.Module):
    found = head_importance(bert, [ids(2)], per_sample, ablate=True)
    by_hand = scaled(bert, ids(2), found.sites[0].name, 3, 0.0).mean() - per_sample(bert, ids(2)).mean()
    assert found.ablation is not None
    assert found.ablation[0][3].item() == pytest.approx(by_hand.item())


def test_parameters_keep_their_gradients(bert: nn.Module):
    head_importance(bert, [ids(2)], per_sample)
    assert all(weight.grad is None for weight in bert.parameters())


def test_least_are_the_first_of_the_ranking(bert: nn.Module):
    found = head_importance(bert, [ids(2)], per_sample)
    by_name = dict(zip((site.name for site in found.sites), found.scores, strict=True))
    values = [by_name[name][head].item() for name, head in found.ranking()]
    assert values == sorted(values)
    assert sorted((name, head) for name, heads in found.least(0.4).items() for head in heads) == sorted(
        found.ranking()[:3]
    )


def test_pruning_masks_the_least_important_first(bert: nn.Module):
    found = head_importance(bert, [ids(2)], per_sample)
    pruned = prune_heads(bert, [ids(2)], per_sample, (0.25, 0.5, 1.0))
    assert [step.heads for step in pruned.steps] == [found.least(share) for share in (0.25, 0.5, 1.0)]
    with attach(bert, without_heads(found.least(0.5))):
        assert pruned.steps[1].value == pytest.approx(per_sample(bert, ids(2)).mean().item())
    assert pruned.whole == pytest.approx(per_sample(bert, ids(2)).mean().item())


def test_importance_is_measured_anew_for_what_is_left(bert: nn.Module):
    pruned = prune_heads(bert, [ids(2)], per_sample, (0.25, 0.5), reestimate=True, evaluate=lambda model: 7.0)
    first, second = ({(name, head) for name, heads in step.heads.items() for head in heads} for step in pruned.steps)
    again = head_importance(bert, [ids(2)], per_sample, without=pruned.steps[0].heads)
    assert second == first | set([each for each in again.ranking() if each not in first][:2])
    assert all(again.scores[0][head] == 0 for head in pruned.steps[0].heads.get(again.sites[0].name, ()))
    assert [pruned.whole, *(step.value for step in pruned.steps)] == [7.0] * 3


REMOVED = {
    "one": lambda sites: {sites[0].name: [2]},
    "unequal groups": lambda sites: {sites[0].name: [0, 1, 3], sites[1].name: [1]},
    "whole group": lambda sites: {sites[1].name: [0, 1]},
    "whole layer": lambda sites: {sites[0].name: [0, 1, 2, 3]},
}


@pytest.mark.parametrize("which", REMOVED)
@pytest.mark.parametrize("name", ["BERT", "Llama", "Qwen3", "Gemma3", "Mistral", "GPT-2", "ViT", "BART"])
def test_removing_equals_masking(name: str, which: str):
    model, inputs = tiny(name), FAMILIES[name].inputs()
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    heads = REMOVED[which](find(model))
    with torch.no_grad(), attach(model, without_heads(heads)):
        masked = model(**inputs)[0]
    remove_heads(model, heads)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs)[0], masked, rtol=1e-9, atol=1e-12)


def test_smaller_model_generates_what_the_masked_one_does():
    model, inputs = tiny("Llama"), FAMILIES["Llama"].inputs()
    heads = REMOVED["unequal groups"](find(model))
    with attach(model, without_heads(heads)):
        masked = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    remove_heads(model, heads)
    assert torch.equal(model.generate(**inputs, max_new_tokens=6, do_sample=False), masked)


def test_rows_and_columns_are_really_gone():
    model = tiny("BERT")
    attention = model.encoder.layer[0].attention
    # Three projections lose 8 rows of 32 and 8 biases, the output 8 columns of 32.
    assert remove_heads(model, {"encoder.layer.0.attention.self": [1]}) == 3 * (8 * 32 + 8) + 8 * 32
    assert attention.self.query.weight.shape == (24, 32)
    assert attention.output.dense.weight.shape == (32, 24)
    assert [site.heads for site in find(model)] == [3, 4]


def test_door_opens_on_the_smaller_model():
    model = tiny("Llama")
    remove_heads(model, {"model.layers.0.self_attn": [0, 1, 3]})
    assert [(site.heads, site.key_heads) for site in find(model)] == [(1, 1), (4, 2)]
    assert [len(scores) for scores in head_importance(model, [ids(2)], per_sample).scores] == [1, 4]


@pytest.mark.parametrize(
    ("name", "heads", "problem"),
    [
        ("T5", [0], "is a T5Attention; known are"),
        ("Swin", [0], "has weights that may belong to heads: relative_position_bias"),
        ("BERT", [4], r"heads \[4\] of .*, which has 4; give 0 to 3"),
    ],
)
def test_what_cannot_be_removed_is_refused(name: str, heads: list[int], problem: str):
    model = tiny(name)
    before = {key: value.shape for key, value in model.state_dict().items()}
    names = [site.name for site in find(model)]
    with pytest.raises(ValueError, match=problem):
        remove_heads(model, {names[1]: [0], names[0]: heads})
    assert {key: value.shape for key, value in model.state_dict().items()} == before


def test_what_cannot_be_measured_is_refused(bert: nn.Module):
    with pytest.raises(ValueError, match=r"training mode; call model.eval\(\)"):
        head_importance(tiny("BERT").train(), [ids(2)], per_sample)
    with pytest.raises(ValueError, match="data is empty"):
        head_importance(bert, [], per_sample)
    with pytest.raises(ValueError, match="3 losses of a batch of 4"):
        head_importance(bert, [ids(4)], lambda model, batch: per_sample(model, batch)[:3])
    with pytest.raises(ValueError, match="give increasing numbers"):
        prune_heads(bert, [ids(2)], per_sample, (0.5, 0.2))


def test_results_print_and_plot(bert: nn.Module):
    done: list[tuple[int, int]] = []
    found = head_importance(bert, [ids(2)], per_sample, ablate=True, progress=lambda *each: done.append(each))
    assert done[-1] == (9, 9)
    assert found.table().row_count == 2
    assert [len(trace.z) for trace in found.figure().data] == [2, 2]
    pruned = prune_heads(bert, [ids(2)], per_sample, (0.5,))
    assert pruned.table().row_count == 2
    assert tuple(pruned.figure().data[0].x) == (0.0, 0.5)


def embedded(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    states, mask = model(**batch)[0], batch["attention_mask"][..., None]
    return nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def similarity_of_pairs(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    return embedded(model, batch).unflatten(0, (-1, 2)).prod(1).sum(-1)


def test_least_important_heads_of_pretrained_bert_change_similarities_less_than_random_ones():
    model, tokenizer = load()
    texts = sentences()

    def batch(chosen: list[str]) -> dict[str, Any]:
        return dict(tokenizer(chosen, padding=True, return_tensors="pt"))

    @torch.no_grad()
    def similarities(heads: dict[str, list[int]]) -> Tensor:
        with attach(model, without_heads(heads)):
            vectors = embedded(model, batch(texts[-24:]))
        return vectors @ vectors.mT

    def change(heads: dict[str, list[int]]) -> float:
        return (similarities(heads) - whole).abs().mean().item()

    whole = similarities({})
    # Layers compare as they are: the change of a similarity is one number for all of them.
    found = head_importance(model, [batch(texts[:24])], similarity_of_pairs, normalize=False)
    ranking = found.ranking()
    for seed in range(3):
        heads: dict[str, list[int]] = {}
        for place in torch.randperm(72, generator=torch.Generator().manual_seed(seed))[:14].tolist():
            heads.setdefault(ranking[place][0], []).append(ranking[place][1])
        assert change(found.least(0.2)) < 0.7 * change(heads)
