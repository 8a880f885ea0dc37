"""The Set Transformer is a function of sets: of any size, in any order."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from moved import moved, never_learning
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from regard.models.sets import SetTransformer
from regard.nn.sets.set_transformer import SetAttention
from regard.ops.masks import Padding

DOUBLE = torch.float64
GOLDEN = Path(__file__).parents[1] / "golden" / "set_transformer.safetensors"
AUTHORS = {"attention.key": "fc_k", "attention.value": "fc_v", "feed.linear": "fc_o"}


def sets(batch: int, elements: int, features: int = 3) -> Tensor:
    return torch.randn(batch, elements, features, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))


def network(**options: object) -> SetTransformer:
    torch.manual_seed(0)
    return SetTransformer(3, 2, 5, **{"dim": 8, "heads": 2, "inducing": 3, "dtype": DOUBLE, **options})


def test_output_and_gradients_are_those_of_the_authors_model():
    """With what their code has in place of X W, of W^Q and W^O, and without the rFF that it leaves out of PMA."""
    golden = {
        name.removeprefix("model."): value for name, value in load_file(GOLDEN).items() if name.startswith("model.")
    }
    model = SetTransformer(6, 2, 3, dim=6, heads=2, inducing=3, decoder_layers=2, norm=False, dtype=DOUBLE)

    def take(block: SetAttention, prefix: str) -> None:
        ours = block.state_dict()
        for name in ("attention.query.weight", "attention.output.weight"):
            ours[name] = torch.eye(6, dtype=DOUBLE)
        for mine, theirs in AUTHORS.items():
            for kind in ("weight", "bias") if theirs == "fc_o" else ("weight",):
                ours[f"{mine}.{kind}"] = golden[f"{prefix}.{theirs}.{kind}"]
        block.load_state_dict(ours)

    model.embedding = torch.nn.Linear(6, 6, dtype=DOUBLE)
    with torch.no_grad():
        model.embedding.weight.copy_(torch.eye(6))
        model.embedding.bias.zero_()
        for index, layer in enumerate(model.encoder):
            layer.points.copy_(golden[f"enc.{index}.I"])
            take(layer.gather, f"enc.{index}.mab0")
            take(layer.read, f"enc.{index}.mab1")
        model.pool.seeds.copy_(golden["dec.0.S"])
        take(model.pool.block, "dec.0.mab")
        model.pool.feed = torch.nn.Identity()
        for index, layer in enumerate(model.decoder, start=1):
            take(layer, f"dec.{index}.mab")
        model.head.weight.copy_(golden["dec.3.weight"])
        model.head.bias.copy_(golden["dec.3.bias"])
    x = golden["input0"].requires_grad_()
    out = model(x)
    assert_close(out, golden["out"], rtol=1e-11, atol=1e-11)
    learned = {
        "input0": x,
        "enc.0.I": model.encoder[0].points,
        "enc.1.I": model.encoder[1].points,
        "dec.0.S": model.pool.seeds,
        "dec.3.weight": model.head.weight,
    }
    for name, gradient in zip(learned, torch.autograd.grad(out, [*learned.values()], golden["seed"]), strict=True):
        assert_close(gradient, golden[f"grad.{name}"], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("inducing", [None, 3])
@pytest.mark.parametrize("elements", [1, 7, 40])
def test_order_is_irrelevant(inducing: int | None, elements: int):
    model, x = moved(network(inducing=inducing)), sets(2, elements)
    out = model(x)
    assert out.shape == (2, 2, 5)
    assert_close(model(x[:, torch.randperm(elements)]), out, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("inducing", [None, 3])
def test_sets_of_unequal_size_give_what_each_gives_alone(inducing: int | None):
    model, x = moved(network(inducing=inducing)), sets(3, 9)
    out = model(x, mask=Padding(torch.tensor([9, 4, 1])))
    for sample, length in enumerate((9, 4, 1)):
        assert_close(out[sample], model(x[sample : sample + 1, :length])[0])


def test_outputs_know_of_each_other_by_the_decoder_alone():
    """Moving the second seed moves the first output where there is a SAB after pooling, and only there."""
    for layers, moves in ((0, False), (1, True)):
        model, x = network(decoder_layers=layers), sets(1, 6)
        before = model(x)[:, 0]
        with torch.no_grad():
            model.pool.seeds[:, 1] += torch.arange(8)
        assert torch.allclose(model(x)[:, 0], before) is not moves


@pytest.mark.parametrize("inducing", [None, 3])
def test_every_parameter_learns(inducing: int | None):
    assert not never_learning(lambda: network(inducing=inducing), sets(2, 6))


def test_it_learns_a_maximum_which_a_mean_of_elements_does_not_tell():
    """The paper's first task, with sets of up to ten numbers."""
    torch.manual_seed(0)
    model = SetTransformer(1, 1, 1, dim=32, heads=4, inducing=None, norm=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    errors = []
    for _ in range(300):
        x, lengths = torch.rand(64, 10, 1), torch.randint(1, 11, (64,))
        largest = x.masked_fill((torch.arange(10) >= lengths[:, None])[..., None], 0.0).amax(1)
        error = F.l1_loss(model(x, mask=Padding(lengths))[:, 0], largest)
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    # Knowing no element but the mean of all, the error is about 0.1.
    assert sum(errors[-20:]) / 20 < 0.04


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"features": 0}, "features 0; give a positive width"),
        ({"output_dim": 0}, "output_dim 0"),
        ({"outputs": 0}, "seeds 0"),
        ({"encoder_layers": -1}, "encoder_layers -1"),
        ({"inducing": 0}, "inducing 0"),
    ],
)
def test_bad_sizes_are_named(arguments: dict[str, int], message: str):
    with pytest.raises(ValueError, match=message):
        SetTransformer(**{"features": 3, "outputs": 2, "output_dim": 5, **arguments})


def test_sets_of_another_width_are_refused():
    with pytest.raises(ValueError, match=r"SetTransformer: x of shape \(1, 4, 2\).*\(batch, elements, 3\)"):
        network()(sets(1, 4, 2))
