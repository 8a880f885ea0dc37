"""TransNormerLLM is its equations and its first author's model, as large as the paper says, with a constant state."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from moved import moved, never_learning
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from regard.models.language import SIZES, Decoder, LanguageModel, SimpleGLU, TransNormerLM
from regard.nn import LightningAttention, TransNormerAttention
from regard.testing.compare import assert_differs, assert_same

GOLDEN = Path(__file__).parents[1] / "golden" / "transnormer.safetensors"
VOCABULARY, LENGTH = 11, 14
MECHANISMS = ["transnormer", "lightning"]


def build(mechanism: str = "transnormer", **changes: object) -> TransNormerLM:
    torch.manual_seed(0)
    given = {"dim": 16, "heads": 4, "layers": 3, "dtype": torch.float64, **changes}
    return moved(TransNormerLM(VOCABULARY, mechanism, **given))


def tokens(length: int = LENGTH, seed: int = 1) -> Tensor:
    return torch.randint(VOCABULARY, (2, length), generator=torch.Generator().manual_seed(seed))


def feed(model: LanguageModel, pieces: list[Tensor], state: object) -> tuple[Tensor, object]:
    outputs = []
    for piece in pieces:
        out, state = model.step(piece, state)
        outputs.append(out)
    return torch.cat(outputs, dim=1), state


def norm(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("scaled", [True, False])
def test_the_model_is_its_equations(mechanism: str, scaled: bool):
    model = build(mechanism, scale_embedding=scaled)
    x = model.embedding.weight[tokens()] * (4 if scaled else 1)
    for block in model.blocks:
        x = x + block.mixer(norm(x))
        y = norm(x)
        x = x + (y @ block.glu.value.weight.T * (y @ block.glu.gate.weight.T)) @ block.glu.output.weight.T
    assert_close(model(tokens()), norm(x) @ model.embedding.weight.T, rtol=1e-10, atol=1e-10)


def test_its_mechanisms_know_their_layer():
    first, *rest = (block.mixer for block in build().blocks)
    assert isinstance(first, TransNormerAttention)
    assert first.angles is not None
    assert [mixer.angles for mixer in rest] == [None, None]
    lightning = [block.mixer for block in build("lightning").blocks]
    assert all(type(mixer) is LightningAttention for mixer in lightning)
    for mixers in ([first, *rest], lightning):
        assert (mixers[0].log_decay < mixers[1].log_decay).all()
        assert (mixers[1].log_decay < mixers[2].log_decay).all()


def test_norms_have_no_parameters_and_embeddings_are_the_head():
    names = {name.removeprefix("embedding.").split(".", 2)[-1] for name, _ in build().named_parameters()}
    mixer = {f"mixer.{part}.weight" for part in ("query", "key", "value", "gate", "output")}
    glu = {f"glu.{part}.weight" for part in ("value", "gate", "output")}
    assert names == {"weight", "mixer.angles"} | mixer | glu


def test_weights_start_with_the_released_deviation():
    torch.manual_seed(0)
    model = TransNormerLM(200, dim=128, options={"bias": True})
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif not name.endswith("angles"):
            assert parameter.std().item() == pytest.approx(0.02, rel=0.03), name


@pytest.mark.parametrize(
    ("size", "vocabulary", "millions"), [("385M", 50_272, 384.9), ("1B", 64_000, 1020.3), ("7B", 64_000, 6836.7)]
)
def test_sizes_are_those_of_the_paper(size: str, vocabulary: int, millions: float):
    """385M of the ablations; 1.0 and 6.8 billion of the benchmarks."""
    model = TransNormerLM(vocabulary, **SIZES[size], device="meta")
    dim, layers, width = (SIZES[size][name] for name in ("dim", "layers", "glu_dim"))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == layers * (5 * dim**2 + 3 * dim * width) + vocabulary * dim + dim
    assert count / 1e6 == pytest.approx(millions, abs=0.05)


def test_logits_do_not_depend_on_later_tokens():
    model, x = build(), tokens()
    changed = x.clone()
    changed[:, 9:] = (x[:, 9:] + 1) % VOCABULARY
    with torch.no_grad():
        before, after = model(x), model(changed)
    assert_same(after[:, :9], before[:, :9], "logits before the tokens that changed")
    assert_differs(after[:, 9], before[:, 9], "logits of a token that changed")


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_every_parameter_learns(mechanism: str):
    assert not never_learning(lambda: build(mechanism, options={"bias": True}), tokens())


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("pieces", [[1] * LENGTH, [9, 1, 1, 3], [LENGTH]], ids=["tokens", "pieces", "whole"])
def test_steps_equal_forward(mechanism: str, pieces: list[int]):
    model, x = build(mechanism), tokens()
    with torch.no_grad():
        found, _ = feed(model, [*x.split(pieces, dim=1)], model.init_state(2))
        assert_same(found, model(x), "logits of the steps")


def test_a_state_can_be_continued_twice():
    model, x, other = build(), tokens(), tokens(seed=2)
    with torch.no_grad():
        _, state = feed(model, [x[:, :5]], model.init_state(2))
        kept = copy.deepcopy(state)
        feed(model, [*other[:, 5:].split(2, dim=1)], state)
        again, _ = feed(model, [x[:, 5:]], state)
        assert_same(again, model(x)[:, 5:], "logits after another branch went on from the state")
        assert_same(again, feed(model, [x[:, 5:]], kept)[0], "logits from a copy of the state")


def state_bytes(state: object) -> int:
    if isinstance(state, Tensor):
        return state.untyped_storage().nbytes()
    return sum(state_bytes(part) for part in state)  # pyright: ignore[reportGeneralTypeIssues]


@pytest.mark.parametrize(("mechanism", "squares", "counts"), [("transnormer", 4, 3), ("lightning", 3, 0)])
def test_the_state_is_as_large_after_ten_thousand_tokens_as_after_ten(mechanism: str, squares: int, counts: int):
    """A d² / h square a layer, two in the first where LRPE is, and what counts the tokens."""
    model = build(mechanism, dtype=torch.float32)
    with torch.no_grad():
        _, state = model.step(tokens(10), model.init_state(2))
        early = state_bytes(state)
        _, state = model.step(tokens(9990), state)
    assert early == state_bytes(state) == 2 * squares * (16 * 16 // 4) * 4 + counts * 8


def test_it_is_a_language_model_like_the_decoder():
    assert issubclass(Decoder, LanguageModel)
    assert TransNormerLM.step is Decoder.step


def test_a_gated_unit_without_gate_values_gives_nothing():
    unit = SimpleGLU(6, 9)
    with torch.no_grad():
        unit.gate.weight.zero_()
    assert (unit(torch.randn(2, 6)) == 0).all()


@pytest.mark.parametrize("name", ["layers", "glu_dim"])
def test_sizes_that_make_no_model_are_refused(name: str):
    with pytest.raises(ValueError, match=rf"TransNormerLM: {name} 0; give a positive number"):
        TransNormerLM(VOCABULARY, **{name: 0})


def test_a_mechanism_over_grids_is_refused():
    with pytest.raises(ValueError, match="TransNormerLM: mechanism 'dinat' takes a grid; choose one of"):
        TransNormerLM(VOCABULARY, "dinat")


def test_logits_loss_and_gradients_are_those_of_the_authors_model():
    kept = load_file(GOLDEN)
    model = TransNormerLM(
        11,
        dim=8,
        heads=4,
        layers=3,
        glu_dim=16,
        scale_embedding=False,
        options={"decay": "alibi"},
        dtype=torch.float64,
    )
    parts = {"mixer.output": "token_mixer.out_proj"}
    parts |= {
        f"glu.{ours}": f"channel_mixer.{theirs}"
        for ours, theirs in zip(("value", "gate", "output"), ("l1", "l2", "l3"), strict=True)
    }

    def gather(prefix: str) -> dict[str, Tensor]:
        found = {"embedding.weight": kept[f"{prefix}.transnormer.wte.weight"]}
        for index in range(3):
            ours, theirs = f"blocks.{index}", f"{prefix}.transnormer.h.{index}"
            for here, there in parts.items():
                found[f"{ours}.{here}.weight"] = kept[f"{theirs}.{there}.weight"]
            joint = kept[f"{theirs}.token_mixer.qkvu_proj.weight"].chunk(4)
            for here, weight in zip(("query", "key", "value", "gate"), joint, strict=True):
                found[f"{ours}.mixer.{here}.weight"] = weight
        found["blocks.0.mixer.angles"] = kept[f"{prefix}.transnormer.h.0.token_mixer.lrpe.theta"][:, 0]
        return found

    ours = dict(model.named_parameters())
    weights, gradients = gather("model.weight"), gather("model.grad")
    assert ours.keys() == weights.keys()
    with torch.no_grad():
        for name, weight in weights.items():
            ours[name].copy_(weight)
    logits = model(kept["model.tokens"])
    loss = F.cross_entropy(logits.flatten(0, 1), kept["model.targets"].flatten())
    assert_close(logits, kept["model.logits"], rtol=1e-10, atol=1e-11)
    assert_close(loss, kept["model.loss"], rtol=1e-11, atol=0)
    for name, found in zip(ours, torch.autograd.grad(loss, list(ours.values())), strict=True):
        assert_close(found, gradients[name], rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")
