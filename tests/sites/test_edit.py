"""The editing language against the same change made by hand, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from families import FAMILIES, text
from torch import Tensor
from torch.nn.functional import relu

from regard.sites import AttentionCall, Capture, Edit, Tokens, Where, attach, find
from regard.sites.call import mix

LAYER, HEADS, KEYS, FACTOR = 1, [0, 3], slice(2, 5), 0.25
HEAD_ROWS = torch.tensor([1, 0, 0, 1], dtype=torch.bool)[:, None, None]


def halved(values: Tensor) -> Tensor:
    """A function that JSON can name."""
    return values / 2


@pytest.fixture(scope="module")
def llama() -> torch.nn.Module:
    torch.manual_seed(0)
    return FAMILIES["Llama"].build().double().eval()


@pytest.fixture(scope="module")
def call(llama) -> AttentionCall:
    """The call of layer 1 on two sequences, one of them padded."""
    seen: list[AttentionCall] = []

    def keep(one: AttentionCall) -> AttentionCall:
        seen.append(one)
        return one

    with torch.no_grad(), attach(llama, keep):
        llama(**text())
    return seen[LAYER]


def every(call: AttentionCall) -> slice:
    return slice(0, call.queries)


def by_hand(call: AttentionCall, op: str, site: str) -> Tensor:
    """The output with `HEADS` edited at `KEYS` by dense matrices."""
    hit = (HEAD_ROWS & (torch.arange(call.keys) >= 2) & (torch.arange(call.keys) < 5)).expand(call.batch, -1, -1, -1)
    logits, weights = call.logits(every(call)), call.weights(every(call))
    if (site, op) == ("logits", "add"):
        weights = call.normalize(logits + FACTOR * hit, None)
    elif (site, op) == ("logits", "scale"):
        weights = call.normalize(torch.where(hit, logits * FACTOR, logits), None)
    elif (site, op) == ("logits", "set"):
        weights = call.normalize(torch.where(hit, FACTOR, logits), None)
    elif (site, op) == ("logits", "mask"):
        weights = call.normalize(logits.masked_fill(hit, -torch.inf), None)
    elif (site, op) == ("weights", "add"):
        weights = weights + FACTOR * hit
    elif (site, op) == ("weights", "scale"):
        scaled = torch.where(hit, weights * FACTOR, weights)
        weights = scaled * (weights.sum(-1, keepdim=True) / scaled.sum(-1, keepdim=True).clamp_min(1e-300))
    elif (site, op) == ("weights", "set"):
        weights = torch.where(hit, FACTOR, weights)
    elif (site, op) == ("weights", "mask"):
        weights = weights.masked_fill(hit, 0.0)
    return mix(weights, call.value)


CASES = [(site, op) for site in ("logits", "weights") for op in ("add", "scale", "set", "mask")]


@pytest.mark.parametrize(("site", "op"), CASES)
def test_an_edit_is_the_change_made_by_hand(call, site, op):
    edit = Edit(Where(heads=HEADS, keys=KEYS), site, op, None if op == "mask" else FACTOR)
    assert torch.allclose(edit(call).output(), by_hand(call, op, site), atol=1e-12)


@pytest.mark.parametrize(("site", "op"), CASES)
def test_the_fused_kernel_carries_what_is_said_to_be_fused(call, site, op):
    edit = Edit(Where(heads=HEADS, keys=KEYS), site, op, None if op == "mask" else FACTOR)
    assert edit(call).fused is edit.fused
    assert edit.fused is ((site, op) in {("logits", "add"), ("logits", "mask"), ("weights", "scale")})


def test_only_the_chosen_queries_change(call):
    edit = Edit(Where(queries=[-1, 3]), "weights", "set", 0.1)
    same = (edit(call).output() == call.output()).all(-1).all(1)
    assert (~same[0]).nonzero().flatten().tolist() == [3, 11]


def test_an_output_edit_scales_heads(call):
    before = call.output()
    after = Edit(Where(heads=[1]), "output", "scale", 0.0)(call).output()
    assert (after[:, 1] == 0).all()
    assert torch.equal(after[:, [0, 2, 3]], before[:, [0, 2, 3]])


def test_moved_mass_is_kept(call):
    moved = Edit(Where(keys=[0, 1]), "weights", "move", 0.5, to=slice(2, None))(call)
    before, after = call.weights(every(call)), moved.weights(every(call))
    assert torch.allclose(after.sum(-1), before.sum(-1), atol=1e-12)
    # Sample 0 is not padded; from its third query on there are keys to move to.
    assert torch.allclose(after[0, :, 2:, :2], before[0, :, 2:, :2] / 2)


def test_mass_that_no_key_can_take_stays(call):
    moved = Edit(Where(keys=[0]), "weights", "move", to=[11])(call).weights(every(call))
    # Key 11 lies in the future of every query but the last.
    assert torch.equal(moved[0, :, :-1], call.weights(every(call))[0, :, :-1])
    assert (moved[0, :, -1, 0] == 0).all()


def test_a_swap_of_a_run_with_itself_changes_nothing(call):
    class Itself:
        def get(self, what: str, *, site: str, step: int) -> Tensor:
            return {"map": call.weights(every(call)), "logits": call.logits(every(call)), "output": call.output()}[what]

    for site in ("logits", "weights", "output"):
        assert torch.allclose(Edit(site=site, op="swap", run=Itself())(call).output(), call.output(), atol=1e-12)


@pytest.mark.parametrize(("site", "what"), [("weights", "map"), ("logits", "logits"), ("output", "output")])
def test_a_captured_run_takes_the_place_of_another(llama, site, what):
    """With layer 0 of the other prompt, and its embedding left out, only what comes after differs."""
    other = {
        **text(),
        "input_ids": text()["input_ids"].flip(0).clamp(min=3),
        "attention_mask": text()["attention_mask"],
    }
    seen: list[Tensor] = []

    def keep(one: AttentionCall) -> AttentionCall:
        if one.site.layer == 0:
            seen.append(one.weights(every(one)) if site != "output" else one.output())
        return one

    capture = Capture(what, layers=0)
    with torch.no_grad():
        with attach(llama, capture, keep):
            llama(**other)
        with attach(llama, Edit(Where(layers=0), site, "swap", run=capture.captured), keep):
            llama(**text())
        with attach(llama, keep):
            llama(**text())
    assert torch.allclose(seen[1], seen[0], atol=1e-6)
    assert not torch.allclose(seen[2], seen[0], atol=1e-3)


def test_tokens_of_a_vision_language_model_are_told_apart():
    family = FAMILIES["LLaVA"]
    model, inputs = family.build(), family.inputs()
    found = find(model, inputs["input_ids"])
    assert found.tokens is not None
    spans = found.tokens.spans()
    assert all(f"{kind} {start}–{stop - 1}" in str(found.table().caption) for kind, start, stop in spans)
    assert {kind for kind, _, _ in spans} == {"text", "image"}
    assert all(
        (inputs["input_ids"][0, start:stop] == model.config.image_token_id).all() == (kind == "image")
        for kind, start, stop in spans
    )


def test_a_function_is_applied_where_it_is_meant(call):
    edited = Edit(Where(keys=[0]), "weights", halved)(call).weights(every(call))
    assert torch.equal(edited[..., 0], call.weights(every(call))[..., 0] / 2)
    assert torch.equal(edited[..., 1:], call.weights(every(call))[..., 1:])


def test_edits_compose_in_order(call):
    twice = Edit(op="add", value=1.0, where=Where(keys=[0]))(Edit(op="set", value=2.0, where=Where(keys=[0]))(call))
    assert (twice.logits(every(call))[..., 0] == 3.0).all()
    other = Edit(op="set", value=2.0, where=Where(keys=[0]))(Edit(op="add", value=1.0, where=Where(keys=[0]))(call))
    assert (other.logits(every(call))[..., 0] == 2.0).all()


def test_a_query_whose_keys_are_all_masked_gives_zeros(llama):
    for implementation in ("sdpa", "eager"):
        # In float32: the host's eager softmax turns the float64 mask of padding into NaN by itself.
        model = copy.deepcopy(llama).float()
        model.set_attn_implementation(implementation)
        outs: list[Tensor] = []

        def keep(one: AttentionCall, outs=outs) -> AttentionCall:
            outs.append(one.output())
            return one

        with torch.no_grad(), attach(model, Edit(Where(queries=[5]), op="mask"), keep):
            model(**text())
        assert all((out[0, :, 5] == 0).all() and out.isfinite().all() for out in outs)


def test_a_span_stays_where_it_is_while_keys_grow(llama):
    masses: list[float] = []

    def keep(one: AttentionCall) -> AttentionCall:
        if one.site.layer == LAYER:
            masses.append(float(one.weights(slice(one.queries - 1, one.queries))[0, ..., 3:6].sum()))
        return one

    prompt = {name: part[:1] for name, part in text().items()}
    with attach(llama, Edit(Where(keys=slice(3, 6)), op="mask"), keep) as door:
        llama.generate(**prompt, max_new_tokens=5, do_sample=False)
    assert masses == [0.0] * 5
    assert door.step == 4


def test_a_sliding_window_forgets_keys_but_not_their_positions():
    torch.manual_seed(0)
    model = FAMILIES["Mistral"].build().eval()
    prompt = {name: part[:1] for name, part in text().items()}
    hit: list[list[int]] = []

    def keep(one: AttentionCall) -> AttentionCall:
        if one.site.layer == 0:
            hit.append((Where(keys=[10, 14]).key_columns(one)[0].nonzero().flatten() + one.key_start).tolist())
        return one

    with attach(model, keep):
        model.generate(**prompt, max_new_tokens=8, do_sample=False)
    # The window of 6 holds 10 up to token 15 and 14 from token 14 on.
    assert hit[0] == [10]
    assert hit[4] == [10, 14]
    assert hit[-1] == [14]


def test_steps_choose_decoded_tokens(llama):
    prompt = {name: part[:1] for name, part in text().items()}
    seen: list[int] = []

    def note(values: Tensor) -> Tensor:
        seen.append(values.shape[-2])
        return values

    with attach(llama, Edit(Where(steps=slice(1, None), layers=0), "weights", note)):
        llama.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert seen == [1, 1, 1]


def test_a_model_that_decodes_by_step_counts_steps():
    torch.manual_seed(0)
    model = FAMILIES["regard Decoder"].build().eval()
    seen: list[int] = []

    def note(one: AttentionCall) -> AttentionCall:
        seen.append(one.step)
        return one

    with torch.no_grad(), attach(model, note) as door:
        state = model.init_state(1)
        for token in torch.tensor([[3, 4, 5]]).split(1, dim=1):
            _, state = model.step(token, state)
        assert door.step == 2
    assert sorted(set(seen)) == [0, 1, 2]
    assert "step" not in vars(model)


def test_an_encoder_that_runs_before_the_model_is_at_step_0():
    torch.manual_seed(0)
    model = FAMILIES["T5"].build().eval()
    steps: set[tuple[str, int]] = set()

    def note(one: AttentionCall) -> AttentionCall:
        steps.add((one.site.tower, one.step))
        return one

    with attach(model, note):
        model.generate(**text(), max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert steps == {("encoder.block", 0), ("decoder.block", 0), ("decoder.block", 1)}


def test_a_kind_of_token_is_chosen_by_name(call, llama):
    ids = text()["input_ids"]
    tokens = Tokens.of(llama, ids)
    kinds = (tuple("image" if 2 <= place < 5 else "text" for place in range(12)),) * 2
    tokens = Tokens(tokens.labels, kinds)
    by_name, by_place = (Edit(Where(keys=keys), "weights", "scale", FACTOR) for keys in ("image", slice(2, 5)))
    outs = []
    for edit in (by_name, by_place):
        with torch.no_grad(), attach(llama, edit, tokens=tokens):
            outs.append(llama(**text()).logits)
    assert torch.equal(*outs)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_door_on_a_layer_and_one_on_the_model_both_see_its_calls(llama, implementation):
    model = copy.deepcopy(llama).float()
    model.set_attn_implementation(implementation)
    seen: list[tuple[str, str]] = []

    def note(door: str):
        def keep(one: AttentionCall) -> AttentionCall:
            seen.append((door, one.site.name))
            weights = one.weights(every(one))
            rows = (weights.sum(-1) > 0.5)[..., None]
            assert torch.allclose(mix(weights, one.value) * rows, one.attend(None) * rows, atol=1e-5)
            return one

        return keep

    inputs = {"input_ids": text()["input_ids"][:1]}
    with torch.no_grad():
        plain = model(**inputs).logits
        with attach(model.model.layers[0], note("layer")), attach(model, note("model")):
            assert torch.equal(model(**inputs).logits, plain)
    first, second = "model.layers.0.self_attn", "model.layers.1.self_attn"
    assert seen == [("layer", "self_attn"), ("model", first), ("model", second)]
    assert model.config._attn_implementation == implementation


def test_a_gate_per_head_gets_a_gradient(llama):
    gate = torch.ones(4, 1, 1, dtype=torch.float64, requires_grad=True)
    with attach(llama, Edit(Where(layers=0), "output", "scale", gate)):
        llama(**text()).logits.square().sum().backward()
    assert gate.grad is not None
    assert (gate.grad.abs() > 0).all()


EDITS = [
    (Edit(), "logits mask at everything"),
    (
        Edit(Where(layers=3, heads=(1, 4), keys="image"), "weights", "scale", 0.5),
        "weights scale 0.5 at layers 3, heads (1, 4), keys 'image'",
    ),
    (
        Edit(Where(heads={0: [1, 2]}, queries=slice(5, None), keys=[0]), "weights", "move", 0.9, to=range(3, 6)),
        "weights move 0.9 to range(3, 6) at heads {0: [1, 2]}, queries 5:, keys [0]",
    ),
    (
        Edit(Where(sites="*decoder*", kinds="cross", steps=0), "output", "add", torch.tensor([1.0, 2.0])),
        "output add tensor(2,) at steps 0, sites '*decoder*', kinds 'cross'",
    ),
    (Edit(site="weights", op=relu), "weights torch.nn.functional:relu at everything"),
]


@pytest.mark.parametrize(("edit", "line"), EDITS)
def test_an_edit_prints_as_one_line(edit, line):
    assert str(edit) == line


@pytest.mark.parametrize("edit", [edit for edit, _ in EDITS])
def test_json_brings_an_edit_back(edit, call):
    back = Edit.from_json(edit.to_json())
    assert str(back).replace("[1, 4]", "(1, 4)") == str(edit)
    assert back.to_json() == edit.to_json()
    if edit.where.keys != "image":
        assert torch.equal(back(call).output(), edit(call).output())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"op": "ad", "value": 1.0}, "did you mean 'add'"),
        ({"site": "logit"}, "did you mean 'logits'"),
        ({"op": "scale"}, "op 'scale' without a value"),
        ({"op": "mask", "value": 1.0}, "value with op 'mask'"),
        ({"site": "output", "where": Where(keys=[1])}, "which has no keys"),
        ({"site": "weights", "op": "scale", "value": -1.0}, "give a number from 0 to inf"),
        ({"site": "logits", "op": "move", "to": 1}, "mass moves between weights"),
        ({"site": "weights", "op": "move", "value": 2.0, "to": 1}, "give a number from 0 to 1"),
        ({"op": "swap"}, "without a run"),
        ({"op": "mask", "to": 1}, "leave it out"),
    ],
)
def test_an_edit_that_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Edit(**arguments)


def test_a_head_that_is_not_there_is_named(llama):
    with (
        pytest.raises(ValueError, match=r"head 4 at model\.layers\.0\.self_attn, which has 4"),
        attach(llama, Edit(Where(heads=[4]))),
    ):
        llama(**text())


def test_a_lambda_is_not_serialised():
    with pytest.raises(ValueError, match="cannot be imported by that path"):
        Edit(site="weights", op=lambda weights: weights).to_json()


def test_layers_count_from_both_ends(llama):
    names = [
        [site.layer for site in find(llama) if Where(layers=layers).at(site, 0)] for layers in (-1, slice(1), [0, 1])
    ]
    assert names == [[1], [0], [0, 1]]


@pytest.mark.parametrize(
    "edits",
    [
        (),
        (Edit(Where(heads=[0], keys=slice(2, 5)), "weights", "scale", 0.5),),
        (Edit(Where(heads=[0], keys=slice(2, 5)), "weights", "set", 0.5),),
        (Edit(Where(heads=[0]), "output", "scale", 0.5),),
    ],
    ids=["none", "bias", "rows", "output"],
)
def test_the_door_of_transformers_compiles_into_one_graph(llama, edits):
    torch.compiler.reset()
    with torch.no_grad(), attach(llama, *edits):
        wanted = llama(**text()).logits
        compiled = torch.compile(llama, backend="eager", fullgraph=True)
        assert torch.allclose(compiled(**text()).logits, wanted, atol=1e-12)
