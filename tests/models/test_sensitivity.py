"""The measured sensitivity is the Jacobian's norm, and shows what partial attention is for."""

from __future__ import annotations

import pytest
import torch
from moved import moved
from torch import Tensor
from torch.autograd.functional import jacobian as jacobian_of
from torch.func import functional_call
from torch.testing import assert_close

from regard.models.language import Decoder, SourceSensitivity, source_sensitivity

VOCABULARY, SOURCE, LENGTH = 13, 3, 8
MECHANISMS = ["multi_head", "partial_attention", "lightning"]


def model_of(mechanism: str = "multi_head", **changes: object) -> Decoder:
    torch.manual_seed(0)
    options = {"source_length": SOURCE} if mechanism == "partial_attention" else None
    given = {"dim": 8, "heads": 2, "options": options, "dtype": torch.float64, **changes}
    return moved(Decoder(VOCABULARY, mechanism, **given).eval())


def tokens(batch: int = 2) -> Tensor:
    """No token twice in a sample: a row of the embedding is then a place in the sequence."""
    random = torch.Generator().manual_seed(1)
    return torch.stack([torch.randperm(VOCABULARY, generator=random)[:LENGTH] for _ in range(batch)])


def explicit(model: Decoder, given: Tensor) -> Tensor:
    """‖∂ logits of target t / ∂ embedding of source token j‖ from the whole Jacobian to the embedding's table."""
    table = model.embedding.weight.detach()
    jacobian = jacobian_of(lambda table: functional_call(model, {"embedding.weight": table}, given), table)
    blocks = jacobian[:, SOURCE:].norm(dim=(2, 4))
    return torch.stack([blocks[sample][:, row] for sample, row in enumerate(given[:, :SOURCE])])


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_exact_sensitivity_is_the_norm_of_the_explicit_jacobian(mechanism: str):
    model, given = model_of(mechanism), tokens()
    assert_close(source_sensitivity(model, given, SOURCE).by_token, explicit(model, given), rtol=1e-10, atol=1e-12)


def test_total_is_the_norm_to_the_whole_source():
    found = SourceSensitivity(torch.tensor([[[3.0, 4.0], [0.0, 2.0]]]), None)
    assert_close(found.total, torch.tensor([[5.0, 2.0]]))


def test_hidden_states_are_what_the_head_reads():
    """With the identity for a head, logits are the hidden states."""
    model, given = model_of(dim=VOCABULARY - 1, heads=2), tokens()
    hidden = source_sensitivity(model, given, SOURCE, output="hidden")
    with torch.no_grad():
        model.head.weight.copy_(torch.eye(VOCABULARY, VOCABULARY - 1))
    assert_close(hidden.by_token, source_sensitivity(model, given, SOURCE).by_token)


def test_estimate_is_unbiased():
    model, given = model_of(layers=1), tokens(1)
    exact = source_sensitivity(model, given, SOURCE).by_token.square()
    probes = 400
    found = source_sensitivity(model, given, SOURCE, probes=probes).by_token.square()
    # √(2 / probes) is the largest relative deviation an entry may have.
    assert ((found / exact - 1).abs() < 4 * (2 / probes) ** 0.5).all()
    assert ((found - exact).abs() > 1e-6 * exact).any()


def test_estimate_follows_its_seed():
    model, given = model_of(layers=1), tokens(1)
    first, again, other = (source_sensitivity(model, given, SOURCE, probes=2, seed=seed).by_token for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def test_attention_is_the_weight_on_the_source():
    model, given = model_of(), tokens()
    with torch.no_grad():
        for block in model.blocks:
            block.mixer.query.weight.zero_()
    found = source_sensitivity(model, given, SOURCE).attention
    uniform = SOURCE / torch.arange(SOURCE + 1, LENGTH + 1, dtype=torch.float64)
    assert_close(found, uniform.expand(2, 2, 2, -1))


def test_partial_heads_lie_on_the_source_whole():
    found = source_sensitivity(model_of("partial_attention"), tokens(), SOURCE).attention
    own, partial = found.chunk(2, dim=2)
    assert (own < 1).all()
    assert_close(partial, torch.ones_like(partial))


def test_mechanism_without_a_map_has_no_attention():
    assert source_sensitivity(model_of("lightning"), tokens(), SOURCE).attention is None


def test_model_is_left_as_it_was():
    model, given = model_of(), tokens()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        source_sensitivity(model, given, SOURCE, probes=1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(block.mixer._forward_pre_hooks for block in model.blocks)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_untrained_decoder_forgets_its_source_and_with_partial_attention_does_not():
    """From 15 to 94 tokens of context plain attention keeps less than two fifths of its sensitivity, this over half."""
    source, kept = 8, {}
    given = torch.randint(64, (8, 96), generator=torch.Generator().manual_seed(0))
    for mechanism, options in (("multi_head", {}), ("partial_attention", {"source_length": source})):
        torch.manual_seed(0)
        model = Decoder(64, mechanism, dim=16, options=options, dtype=torch.float64).eval()
        total = source_sensitivity(model, given, source, output="hidden", probes=1).total.square().mean(0).sqrt()
        # Behind the reach of two convolutions, which hand the source's last tokens on.
        kept[mechanism] = float(total[-4:].mean() / total[6:10].mean())
    assert kept["multi_head"] < 0.4
    assert kept["partial_attention"] > 0.5


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"source_length": 0}, "source_length 0 of 8 tokens; leave at least one"),
        ({"source_length": LENGTH}, "source_length 8 of 8 tokens; leave at least one"),
        ({"probes": 0}, "probes 0; give a positive number, or None"),
        ({"output": "loss"}, "output 'loss' is not known"),
    ],
    ids=str,
)
def test_what_cannot_be_measured_is_refused(arguments: dict[str, object], problem: str):
    with pytest.raises(ValueError, match=f"source_sensitivity: {problem}"):
        source_sensitivity(model_of(), tokens(), **{"source_length": SOURCE, **arguments})


def test_training_mode_is_refused():
    with pytest.raises(ValueError, match=r"the model is in training mode; call model\.eval"):
        source_sensitivity(model_of().train(), tokens(), SOURCE)
