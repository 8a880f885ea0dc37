"""What a capture keeps equals what follows from the whole matrix of weights, which only the tests build."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from regard import sites
from regard.bench.measure import work
from regard.sites import capture as module
from tests.sites.families import FAMILIES, decoder, text

REDUCED = ["received", "entropy", "distance", "sink", sites.TopK(3), sites.BlockMeans(5), sites.LastRows(3)]


@pytest.fixture(scope="session")
def llama() -> nn.Module:
    return build("Llama")


def build(family: str, implementation: str = "sdpa") -> nn.Module:
    """In float32 with eager attention, whose rows of padding are NaN in float64."""
    torch.manual_seed(0)
    model = FAMILIES[family].build().eval()
    model.set_attn_implementation(implementation)
    return model if implementation == "eager" else model.double()


def seen(model: nn.Module, what: Any, *, run: Callable[[], object] | None = None, **options: Any) -> sites.Captured:
    capture = sites.Capture(what, **options)
    with torch.no_grad(), sites.attach(model, capture):
        run() if run else model(**text())
    return capture.captured


def ids(length: int = 12, batch: int = 2) -> Tensor:
    return torch.randint(3, 90, (batch, length), generator=torch.Generator().manual_seed(2))


def dense(model: nn.Module, run: Callable[[], object], layer: int) -> Tensor:
    """Weights (B, H, N, M) written out from the queries and keys of a causal site without padding."""
    calls = []
    with torch.no_grad(), sites.attach(model, lambda call: calls.append(call) or call):
        run()
    query, key = calls[layer].query, calls[layer].key
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = query @ key.mT / query.shape[-1] ** 0.5
    hidden = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
    return logits.masked_fill(hidden, -torch.inf).softmax(-1)


def reduce(weights: Tensor) -> dict[str, Tensor]:
    """Every reduction by its definition, of weights whose queries and keys start at position 0."""
    length = weights.shape[-1]
    distance = (torch.arange(length)[:, None] - torch.arange(length)).abs()
    blocks = [slice(start, start + 5) for start in range(0, length, 5)]
    best, keys = weights.topk(3)
    return {
        "received": weights.sum(-2),
        "entropy": torch.special.entr(weights).sum(-1),
        "distance": torch.stack([weights[..., distance == each].sum(-1) for each in range(length)], -1),
        "mean_distance": (weights * distance).sum(-1),
        "sink": weights[..., 0],
        "top_k": best,
        "top_k_keys": keys.masked_fill(best == 0, -1),
        "block_means": torch.stack(
            [torch.stack([weights[..., q, k].mean((-1, -2)) for k in blocks], -1) for q in blocks], -2
        ),
        "last_rows": weights[..., -3:, :],
    }


@pytest.mark.parametrize("tile", [1, 3, 5, 128])
@pytest.mark.parametrize("numbers", [1, 2**20])
def test_every_reduction_equals_that_of_the_whole_matrix(llama, monkeypatch, tile: int, numbers: int) -> None:
    monkeypatch.setattr(module, "TILE", tile)
    monkeypatch.setattr(module, "NUMBERS", numbers)
    run = lambda: llama(ids())  # noqa: E731
    found = seen(llama, REDUCED, run=run)
    for layer in range(2):
        for name, wanted in reduce(dense(llama, run, layer)).items():
            torch.testing.assert_close(found.get(name, layer=layer), wanted, rtol=1e-12, atol=1e-12)


def test_a_tile_of_heads_holds_whole_groups_and_parts_of_them(llama, monkeypatch) -> None:
    whole = seen(llama, "map").get("map")
    for heads in (1, 2, 3):
        monkeypatch.setattr(module, "NUMBERS", heads * 2 * 12 * 12)
        torch.testing.assert_close(seen(llama, "map").get("map"), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Gemma3", "BERT"])
def test_maps_are_those_that_the_eager_model_returns(family: str) -> None:
    model, inputs = build(family), text()
    found = seen(model, "map", run=lambda: model(**inputs))
    eager = build(family, "eager")
    with torch.no_grad():
        attentions = eager(**inputs, output_attentions=True).attentions
    asked = inputs["attention_mask"].bool()
    for layer, wanted in enumerate(attentions):
        ours = found.get("map", layer=layer).transpose(1, 2)[asked]
        torch.testing.assert_close(ours, wanted.double().transpose(1, 2)[asked], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_masked_keys_get_exactly_nothing(implementation: str) -> None:
    model = build("Llama", implementation)
    found = seen(model, ["received", "map"])
    padded = text()["attention_mask"] == 0
    assert (found.get("map", layer=1).movedim(-1, 1)[padded] == 0).all()
    assert (found.get("received", layer=1).transpose(1, 2)[padded] == 0).all()
    assert (found.get("received", layer=1).transpose(1, 2)[~padded] > 0).all()


def test_generation_keeps_each_step_apart_with_all_keys_so_far(llama) -> None:
    prompt = ids(7)
    with torch.no_grad():
        answer = llama.generate(prompt, max_new_tokens=4, do_sample=False)
    found = seen(
        llama,
        ["map", "distance", "received"],
        run=lambda: llama.generate(prompt, max_new_tokens=4, do_sample=False),
    )
    whole = dense(llama, lambda: llama(answer), layer=1)
    assert found.steps == (0, 1, 2, 3)
    for step in (1, 2, 3):
        position = 6 + step
        row = whole[:, :, position : position + 1, : position + 1]
        torch.testing.assert_close(found.get("map", layer=1, step=step), row, rtol=1e-10, atol=1e-12)
        by_distance = found.get("distance", layer=1, step=step)
        torch.testing.assert_close(by_distance, row[:, :, 0].flip(-1), rtol=1e-10, atol=1e-12)
        record = found.find("received", layer=1, step=step)[0]
        assert list(record.coordinates["key"]) == list(range(position + 1))


def test_a_sliding_window_keeps_true_positions() -> None:
    model, prompt = build("Mistral"), ids(9)
    run = lambda: model.generate(prompt, max_new_tokens=4, do_sample=False)  # noqa: E731
    found = seen(model, ["map", "distance", "top_k", sites.BlockMeans(4)], run=run)
    with torch.no_grad():
        eager = build("Mistral", "eager")
        whole = eager(run(), output_attentions=True).attentions[1].double()
    record = found.find("map", layer=1, step=3)[0]
    keys, position = record.coordinates["key"], 11
    assert len(keys) == 6
    assert keys[-1] == position
    row = whole[:, :, position]
    torch.testing.assert_close(record.values[:, :, 0], row[..., list(keys)], rtol=1e-5, atol=1e-6)
    by_distance = found.get("distance", layer=1, step=3)
    torch.testing.assert_close(by_distance, row[..., list(keys)].flip(-1), rtol=1e-5, atol=1e-6)
    best = found.get("top_k_keys", layer=1, step=3)[:, :, 0, :1]
    torch.testing.assert_close(best, row.argmax(-1, keepdim=True))
    blocks = found.find("block_means", layer=1, step=3)[0]
    assert list(blocks.coordinates["query_block"]) == [8]
    assert list(blocks.coordinates["key_block"]) == [4, 8]
    means = torch.stack([row[..., 6:8].mean(-1), row[..., 8:12].mean(-1)], -1)
    torch.testing.assert_close(blocks.values[:, :, 0], means, rtol=1e-5, atol=1e-6)


def test_layers_heads_queries_and_keys_are_selected(llama) -> None:
    whole = dense(llama, lambda: llama(ids()), 1)
    options: dict[str, Any] = {"layers": 1, "heads": [3, 0], "queries": [2, 3, 9], "keys": [1, 8]}
    what = ["map", "received", "entropy", "sink", "distance", sites.LastRows(2), sites.TopK(2), sites.BlockMeans(5)]
    found = seen(llama, what, run=lambda: llama(ids()), **options)
    picked = whole[:, [3, 0]][:, :, [2, 3, 9]][..., [1, 8]]
    assert [each.layer for each in found.sites] == [1]
    assert found.find("map")[0].coordinates["head"] == [3, 0]
    wanted = {
        "map": picked,
        "received": picked.sum(-2),
        "entropy": torch.special.entr(picked).sum(-1),
        "sink": picked.sum(-1),
        "last_rows": picked[:, :, 1:],
        "mean_distance": (picked * torch.tensor([[1, 6], [2, 5], [8, 1]])).sum(-1),
    }
    for name, values in wanted.items():
        torch.testing.assert_close(found.get(name, layer=1), values, rtol=1e-12, atol=1e-12)
    profile = found.get("distance", layer=1)
    torch.testing.assert_close(profile[..., 8], picked[:, :, 2, 0], rtol=1e-12, atol=1e-12)
    assert found.get("top_k_keys", layer=1)[0, 0].tolist()[0] == [1, -1]
    blocks = found.get("block_means", layer=1)
    torch.testing.assert_close(blocks[..., 0, 0], picked[:, :, :2, 0].mean(-1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(blocks[..., 1, 1], picked[:, :, 2, 1], rtol=1e-12, atol=1e-12)


def test_samples_may_choose_different_tokens(llama) -> None:
    chosen = torch.zeros(2, 12, dtype=torch.bool)
    chosen[0, 2:4] = chosen[1, 10] = True
    whole = dense(llama, lambda: llama(ids()), 0)
    by_query = seen(llama, ["received", "block_means"], run=lambda: llama(ids()), queries=chosen)
    wanted = torch.stack([whole[0, :, 2:4].sum(-2), whole[1, :, 10]])
    torch.testing.assert_close(by_query.get("received", layer=0), wanted, rtol=1e-12, atol=1e-12)
    means = wanted.sum(-1) / torch.tensor([[24], [12]])
    torch.testing.assert_close(by_query.get("block_means", layer=0)[..., 0, 0], means, rtol=1e-12, atol=1e-12)
    by_key = seen(llama, "map", run=lambda: llama(ids()), keys=chosen)
    record = by_key.find("map", layer=0)[0]
    assert record.coordinates["key"] == [2, 3, 10]
    assert (record.values[0, ..., 2] == 0).all()
    torch.testing.assert_close(record.values[1, ..., 2], whole[1, ..., 10], rtol=1e-12, atol=1e-12)


def test_a_capture_sees_the_edits_before_it_and_no_others(llama) -> None:
    before, after = sites.Capture(["received", "output"]), sites.Capture(["received", "output"])
    forbidden = sites.Edit(sites.Where(keys=5, layers=0), "logits", "mask")
    silenced = sites.Edit(sites.Where(heads=1, layers=0), "output", "mask")
    with torch.no_grad(), sites.attach(llama, before, forbidden, silenced, after):
        llama(ids())
    assert (before.captured.get("received", layer=0)[..., 5] > 0).all()
    assert (after.captured.get("received", layer=0)[..., 5] == 0).all()
    assert (before.captured.get("output", layer=0)[:, 1] != 0).all()
    assert (after.captured.get("output", layer=0)[:, 1] == 0).all()


def test_looking_changes_nothing(llama) -> None:
    with torch.no_grad():
        wanted = llama(**text()).logits
        with sites.attach(llama, sites.Capture([*REDUCED, "map", "logits", "output"])):
            found = llama(**text()).logits
    assert torch.equal(found, wanted)


def test_outputs_are_the_weights_times_the_values(llama) -> None:
    calls = []
    capture = sites.Capture(["map", "output"], heads=[1], queries=slice(4, None))
    with torch.no_grad(), sites.attach(llama, capture, lambda call: calls.append(call) or call):
        llama(ids())
    value = calls[1].value.repeat_interleave(2, 1)[:, [1]]
    wanted = capture.captured.get("map", layer=1) @ value
    torch.testing.assert_close(capture.captured.get("output", layer=1), wanted, rtol=1e-10, atol=1e-12)


def test_logits_are_minus_infinity_where_masked(llama) -> None:
    found = seen(llama, ["logits", "map"], run=lambda: llama(ids()))
    logits = found.get("logits", layer=0)
    assert torch.equal(torch.isneginf(logits[0, 0]), torch.ones(12, 12).triu(1).bool())
    torch.testing.assert_close(logits.softmax(-1), found.get("map", layer=0), rtol=1e-12, atol=1e-12)


def test_gradients_reach_the_model_where_asked(llama) -> None:
    capture = sites.Capture(["received", "entropy"], gradients=True)
    with sites.attach(llama, capture):
        llama(ids())
    weight = llama.model.layers[1].self_attn.q_proj.weight
    (ours,) = torch.autograd.grad(capture.captured.get("entropy", layer=1).sum(), weight)
    capture = sites.Capture("map", gradients=True)
    with sites.attach(llama, capture):
        llama(ids())
    weights = capture.captured.get("map", layer=1)
    (wanted,) = torch.autograd.grad(-(weights * weights.clamp_min(1e-300).log()).sum(), weight)
    torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-12)
    with sites.attach(llama, capture := sites.Capture("entropy")):
        llama(ids())
    assert not capture.captured.get("entropy", layer=0).requires_grad


@pytest.mark.slow
def test_a_compiled_model_is_captured(llama) -> None:
    wanted = seen(llama, ["entropy", "output"], run=lambda: llama(ids()))
    torch._dynamo.reset()
    capture = sites.Capture(["entropy", "output"])
    with torch.no_grad(), sites.attach(llama, capture):
        torch.compile(llama, backend="eager")(ids())
    for name in wanted.names:
        torch.testing.assert_close(capture.captured.get(name), wanted.get(name), rtol=1e-12, atol=1e-12)


class Largest(sites.Reducer):
    """The largest weight of each head."""

    name = "largest"
    results = {"largest": ("sample", "head")}  # noqa: RUF012

    def start(self, view: Any) -> Tensor:
        return view.zeros()

    def tile(self, state: Tensor, weights: Tensor, rows: slice, view: Any) -> Tensor:
        return torch.maximum(state, weights.amax((-1, -2)))

    def finish(self, state: Tensor, view: Any) -> tuple[Tensor]:
        return (state,)


def test_a_reducer_of_ones_own(llama, monkeypatch) -> None:
    monkeypatch.setattr(module, "NUMBERS", 50)
    found = seen(llama, [Largest(), "map"], queries=slice(3, 9))
    torch.testing.assert_close(found.get("largest"), found.get("map").amax((-1, -2)), rtol=0, atol=0)


def test_a_reducer_whose_result_has_other_axes_is_refused(llama) -> None:
    class Wrong(Largest):
        results = {"largest": ("sample", "head", "key")}  # noqa: RUF012

    with pytest.raises(ValueError, match=r"largest has axes sample, head, key and shape \(2, 4\)"):
        seen(llama, Wrong())


def test_maps_beyond_the_limit_are_refused_before_anything_is_computed(llama) -> None:
    bytes_needed = 2 * 4 * 12 * 12 * 8 * 2
    capture = sites.Capture("map", max_bytes=bytes_needed - 1)
    message = (
        rf"2 layers × 4 heads × 12 queries × 12 keys × 2 samples make {bytes_needed:,} bytes.*"
        rf"max_bytes={bytes_needed - 1:,}; choose fewer layers, heads, .*a reducer.*or max_bytes={bytes_needed}"
    )
    with pytest.raises(ValueError, match=message), sites.attach(llama, capture):
        llama(**text())
    with pytest.raises(ValueError, match="nothing was captured"):
        _ = capture.captured
    seen(llama, "map", max_bytes=bytes_needed)
    seen(llama, ["map", "received"], layers=0, heads=0, max_bytes=bytes_needed // 8)


def test_the_limit_holds_for_all_steps_together(llama) -> None:
    with pytest.raises(ValueError, match="with what is kept already"):
        seen(
            llama,
            "map",
            run=lambda: llama.generate(ids(7), max_new_tokens=9, do_sample=False),
            max_bytes=2 * 2 * 4 * 8 * (7 * 7 + 8 + 9),
        )


def test_layers_are_stacked_where_their_shapes_agree() -> None:
    model = build("Gemma3")
    found = seen(model, ["entropy", "received"], run=lambda: model.generate(ids(9), max_new_tokens=3, do_sample=False))
    stacked = found.get("entropy", step=1)
    assert torch.equal(stacked[1], found.get("entropy", layer=1, step=1))
    with pytest.raises(ValueError, match=r"received differs in shape: .*; give a layer or a site"):
        found.get("received", step=1)


def test_labels_travel_to_disk_and_back(llama, tmp_path) -> None:
    tokens = sites.Tokens.of(llama, text()["input_ids"])
    capture = sites.Capture([*REDUCED, "map"], heads=[2, 0])
    with torch.no_grad(), sites.attach(llama, capture, tokens=tokens):
        llama.generate(**text(), max_new_tokens=2, do_sample=False)
    found = capture.captured
    found.save(tmp_path / "seen.safetensors")
    loaded = sites.Captured.load(tmp_path / "seen.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["seen.safetensors"]
    assert loaded.sites == found.sites
    for one, other in zip(loaded.records, found.records, strict=True):
        assert torch.equal(one.values, other.values)
        assert (one.name, one.step, one.call, one.axes) == (other.name, other.step, other.call, other.axes)
        assert one.coordinates == other.coordinates
    record = loaded.find("received", layer=0, step=1)[0]
    assert record.labels("key", sample=1) == [*tokens.labels[1], "12"]
    assert record.kinds("key") == ["text"] * 12 + ["generated"]


def test_image_patches_label_a_tower_of_their_own() -> None:
    torch.manual_seed(0)
    model, inputs = FAMILIES["ViT"].build().eval(), FAMILIES["ViT"].inputs()
    patches = sites.Tokens.patches((4, 4), prefix=["[CLS]"])
    found = seen(model, "received", run=lambda: model(**inputs), tokens={"*": patches})
    assert found.find("received", layer=0)[0].labels("key", sample=1)[:3] == ["[CLS]", "0,0", "0,1"]


def test_sequences_of_another_length_are_not_labelled(llama) -> None:
    capture = sites.Capture("received")
    with torch.no_grad(), sites.attach(llama, capture, tokens=sites.Tokens.of(llama, ids(5))):
        llama(ids())
    assert capture.captured.find("received", layer=0)[0].labels("key")[:2] == ["0", "1"]
    assert capture.captured.find("received", layer=0)[0].kinds("key")[0] == ""


def test_a_file_of_another_kind_is_refused(tmp_path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "a")
    with pytest.raises(ValueError, match="has format None"):
        sites.Captured.load(tmp_path / "a")
    (tmp_path / "b").write_bytes(b"text")
    with pytest.raises(ValueError, match="cannot be read"):
        sites.Captured.load(tmp_path / "b")


def test_captured_data_become_an_xarray(llama) -> None:
    pytest.importorskip("xarray")
    capture = sites.Capture(["entropy", "map"], heads=[2, 0])
    with torch.no_grad(), sites.attach(llama, capture, tokens=sites.Tokens.of(llama, ids())):
        llama(ids())
    node = capture.captured.to_xarray()["/model.layers.1.self_attn/step0"]
    assert node["map"].dims == ("sample", "head", "query", "key")
    assert node["key_label"].values[1].tolist() == list(map(str, ids()[1].tolist()))
    found = node["entropy"].sel(head=0, query=5).values
    assert (found == capture.captured.get("entropy", layer=1)[:, 1, 5].numpy()).all()


def test_what_is_not_there_is_said(llama) -> None:
    with pytest.raises(ValueError, match="'entrophy' is not known; did you mean 'entropy'"):
        sites.Capture("entrophy")
    with pytest.raises(ValueError, match="what asks for last_rows twice"):
        sites.Capture([sites.LastRows(1), sites.LastRows(2)])
    with pytest.raises(ValueError, match="nothing was captured yet; run the model"):
        _ = sites.Capture("entropy").captured
    with pytest.raises(ValueError, match=r"layers=7 fits nothing that ran; there were layers 0 to 1 of model\.layers"):
        seen(llama, "entropy", layers=7)
    found = seen(llama, "entropy", layers=[1])
    with pytest.raises(ValueError, match=r"layer 0 was not captured; there are layers 1"):
        found.get("entropy", layer=0)
    with pytest.raises(ValueError, match="name 'map' is not known"):
        found.get("map")
    with pytest.raises(ValueError, match=r"did you mean 'model\.layers\.1\.self_attn'"):
        found.get("entropy", site="model.layers.1.self_atn")


def test_a_second_run_is_told_apart_or_forgotten(llama) -> None:
    capture = sites.Capture("entropy")
    for length in (5, 8):
        with torch.no_grad(), sites.attach(llama, capture):
            llama(ids(length))
    with pytest.raises(ValueError, match="captured at calls 0, 1; say which"):
        capture.captured.get("entropy", layer=0)
    assert capture.captured.get("entropy", layer=0, call=1).shape[-1] == 8
    capture.clear()
    with pytest.raises(ValueError, match="nothing was captured yet"):
        _ = capture.captured


def test_layers_of_two_towers_are_told_apart() -> None:
    torch.manual_seed(0)
    model, inputs = FAMILIES["BART"].build().eval(), FAMILIES["BART"].inputs()
    found = seen(model, "received", run=lambda: model(**inputs))
    with pytest.raises(ValueError, match=r"layer 0 is that of .*encoder.*say which with site"):
        found.get("received", layer=0)
    cross = next(site for site in found.sites if site.kind == "cross")
    assert found.get("received", site=cross.name).shape == (2, 4, 12)


def test_a_long_sequence_is_never_held_whole(monkeypatch) -> None:
    monkeypatch.setattr(module, "NUMBERS", 2**15)
    torch.manual_seed(0)
    model = decoder("Llama", max_position_embeddings=512).build().eval()
    tokens, whole = ids(512, batch=1), 4 * 512 * 512 * 4
    look = partial(seen, model, REDUCED, run=lambda: model(tokens, use_cache=False))
    peak = work(look, torch.device("cpu")).peak_bytes
    assert peak is not None
    assert peak < whole / 2
