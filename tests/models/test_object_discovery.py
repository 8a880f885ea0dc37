"""The slot attention autoencoder is the authors', and slots are what it paints with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from moved import moved
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from regard.models.sets import ObjectDiscovery
from regard.models.sets.object_discovery import Doubling, SoftPosition
from regard.testing.compare import weighted_sum

DOUBLE = torch.float64
GOLDEN = Path(__file__).parents[1] / "golden" / "slot_attention.safetensors"
SMALL = {"slots": 3, "dim": 8, "width": 6, "encoder_layers": 2, "layers": 2, "doublings": 1}


def images(count: int = 2, size: int = 8) -> Tensor:
    return torch.rand(count, 3, size, size, dtype=DOUBLE, generator=torch.Generator().manual_seed(0)) * 2 - 1


def model(**options: object) -> ObjectDiscovery:
    torch.manual_seed(0)
    return ObjectDiscovery(8, **{**SMALL, "dtype": DOUBLE, **options})


def reset_then_candidate(gates: Tensor) -> Tensor:
    update, reset, candidate = gates.chunk(3, dim=-1)
    return torch.cat([reset, update, candidate], dim=-1)


def test_output_and_gradients_are_those_of_the_authors_model():
    golden = {
        name.removeprefix("model."): value.double()
        for name, value in load_file(GOLDEN).items()
        if name.startswith("model.")
    }
    ours = ObjectDiscovery(16, 2, dim=4, width=4, iterations=2, dtype=DOUBLE)

    def linear(module: torch.nn.Module, name: str) -> dict[Tensor, Tensor]:
        pairs = {module.weight: golden[f"{name}.kernel"].mT}
        return pairs if module.bias is None else {**pairs, module.bias: golden[f"{name}.bias"]}

    def norm(module: torch.nn.Module, name: str) -> dict[Tensor, Tensor]:
        module.eps = 1e-3
        pairs = {module.weight: golden[f"{name}.gamma"]}
        return pairs if module.bias is None else {**pairs, module.bias: golden[f"{name}.beta"]}

    attention, given = ours.attention, "slot_attention"
    pairs = {
        **linear(ours.encoder_position.linear, "encoder_pos.dense"),
        **linear(ours.decoder_position.linear, "decoder_pos.dense"),
        **norm(ours.inputs[0], "layer_norm"),
        **linear(ours.inputs[1], "mlp.layers.0"),
        **linear(ours.inputs[3], "mlp.layers.1"),
        **norm(attention.context_norm, f"{given}.norm_inputs"),
        **norm(attention.slot_norm, f"{given}.norm_slots"),
        **norm(attention.mlp[0], f"{given}.norm_mlp"),
        **linear(attention.mlp[1], f"{given}.mlp.layers.0"),
        **linear(attention.mlp[3], f"{given}.mlp.layers.1"),
        **linear(attention.query, f"{given}.project_q"),
        **linear(attention.key, f"{given}.project_k"),
        **linear(attention.value, f"{given}.project_v"),
        attention.cell.weight_ih: reset_then_candidate(golden[f"{given}.gru.kernel"]).mT,
        attention.cell.weight_hh: reset_then_candidate(golden[f"{given}.gru.rec"]).mT,
        attention.cell.bias_ih: reset_then_candidate(golden[f"{given}.gru.bias"])[0],
        attention.cell.bias_hh: reset_then_candidate(golden[f"{given}.gru.bias"])[1],
        ours.first.mean: golden[f"{given}.slots_mu"][0],
        ours.first.log_deviation: golden[f"{given}.slots_log_sigma"][0],
    }
    for index, layer in enumerate(ours.encoder):
        pairs[layer.weight] = golden[f"encoder_cnn.layers.{index}.kernel"].permute(3, 2, 0, 1)
        pairs[layer.bias] = golden[f"encoder_cnn.layers.{index}.bias"]
    for index, layer in enumerate([*ours.decoder, ours.paint]):
        pairs[layer.weight] = golden[f"decoder_cnn.layers.{index}.kernel"].permute(3, 2, 0, 1)
        pairs[layer.bias] = golden[f"decoder_cnn.layers.{index}.bias"]
    assert {*pairs} == {*ours.parameters()}
    with torch.no_grad():
        for parameter, value in pairs.items():
            parameter.copy_(value)

    image = golden["image"].permute(0, 3, 1, 2)
    first = ours.first.mean + ours.first.log_deviation.exp() * golden["noise"]
    found = ours(image, slots=first)
    assert_close(found.slots, golden["slots"], rtol=1e-8, atol=1e-8)
    assert_close(found.masks, golden["masks"][..., 0], rtol=1e-7, atol=1e-9)
    assert_close(found.image.permute(0, 2, 3, 1), golden["recon"], rtol=1e-7, atol=1e-7)
    error = (found.image - image).square().mean()
    learned = {
        "encoder_pos.dense.kernel": ours.encoder_position.linear.weight,
        "decoder_pos.dense.kernel": ours.decoder_position.linear.weight,
        "slot_attention.slots_mu": ours.first.mean,
        "slot_attention.slots_log_sigma": ours.first.log_deviation,
    }
    for name, gradient in zip(learned, torch.autograd.grad(error, [*learned.values()]), strict=True):
        wanted = golden[f"grad.{name}"]
        assert_close(gradient, wanted.mT if "dense" in name else wanted[0], rtol=1e-6, atol=1e-8)


def test_doubling_is_the_transpose_of_a_convolution_that_halves():
    """⟨halve(y), x⟩ = ⟨y, double(x)⟩ for a convolution that pads one before and two after, as TensorFlow's does."""
    layer = Doubling(3, 4, dtype=DOUBLE)
    torch.nn.init.zeros_(layer.bias)
    x, y = images(1, 5), torch.randn(1, 4, 10, 10, dtype=DOUBLE)
    halved = torch.nn.functional.conv2d(torch.nn.functional.pad(y, (1, 2, 1, 2)), layer.weight, stride=2)
    assert layer(x).shape == y.shape
    assert_close((halved * x).sum(), (y * layer(x)).sum())


def test_position_is_linear_in_the_distances_from_the_borders():
    position = SoftPosition(5, (3, 4), dtype=DOUBLE)
    added = position(torch.zeros(1, 5, 3, 4, dtype=DOUBLE))[0]
    down, right, up, left = position.linear.weight.mT
    for row, column in ((0, 0), (2, 1), (1, 3)):
        y, x = row / 2, column / 3
        expected = y * down + x * right + (1 - y) * up + (1 - x) * left + position.linear.bias
        assert_close(added[:, row, column], expected)


def test_image_is_the_sum_of_its_parts():
    found = model()(images())
    assert_close(found.masks.sum(1), torch.ones(2, 8, 8, dtype=DOUBLE))
    assert_close(found.image, (found.parts * found.masks[:, :, None]).sum(1))
    assert found.objects.shape == (2, 8, 8)


def test_every_slot_is_painted_by_itself():
    """Another slot changes what all see together and nothing of a part."""
    made, slots = moved(model()), torch.randn(1, 3, 8, dtype=DOUBLE)
    before = made.decode(slots)
    slots = slots.clone()
    slots[:, 2] += 1
    after = made.decode(slots)
    assert_close(after.parts[:, :2], before.parts[:, :2], rtol=0, atol=0)
    assert not torch.allclose(after.masks[:, :2], before.masks[:, :2])
    swapped = made.decode(slots.flip(1))
    assert_close(swapped.image, after.image)
    assert_close(swapped.masks, after.masks.flip(1))


def test_any_number_of_slots_may_be_asked_for():
    made = model()
    assert made(images(), slots=made.first(2, slots=6)).parts.shape == (2, 6, 3, 8, 8)


@pytest.mark.parametrize(("options", "still"), [({}, set()), ({"learned": True}, set()), ({"implicit": 1}, {"first"})])
def test_every_parameter_learns_but_first_slots_that_are_taken_for_converged(
    options: dict[str, object], still: set[str]
):
    made = moved(model(**options))
    weighted_sum(made(images()).image).backward()
    silent = {
        name.partition(".")[0]
        for name, parameter in made.named_parameters()
        if parameter.grad is None or not parameter.grad.abs().max() > 0
    }
    assert silent == still


def test_training_lowers_the_error():
    torch.manual_seed(0)
    made, x = ObjectDiscovery(8, **SMALL), images(8).float()
    optimizer = torch.optim.Adam(made.parameters(), lr=3e-3)
    errors = []
    for _ in range(60):
        loss = made.loss(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(loss.item())
    assert sum(errors[-5:]) < 0.8 * sum(errors[:5])


def test_the_default_is_the_papers_model():
    made = ObjectDiscovery(device="meta")
    assert made.start == 8
    assert [type(layer).__name__ for layer in made.decoder] == ["Doubling"] * 4 + ["ConvTranspose2d"]
    assert made.attention.iterations == 3
    assert made.attention.mlp[1].out_features == 128


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 12, "doublings": 3, "layers": 3}, "size 12 cannot be reached by 3 doublings"),
        ({"doublings": 3, "layers": 2}, "doublings 3 among 2 layers"),
        ({"width": 0}, "width 0"),
        ({"slots": 0}, "slots 0"),
    ],
)
def test_bad_sizes_are_named(arguments: dict[str, int], message: str):
    with pytest.raises(ValueError, match=message):
        ObjectDiscovery(**arguments)


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"image of shape \(2, 3, 9, 9\); give \(batch, 3, 8, 8\)"):
        model()(images(2, 9))
