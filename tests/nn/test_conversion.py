"""A trained layer becomes another mechanism, or is refused by the name of what the other does not have."""

from __future__ import annotations

import pytest
import torch

from regard.nn import MultiHeadAttention, VideoMixtureOfBlock
from regard.nn.conversion import converted


def plain(**settings: object) -> MultiHeadAttention:
    return MultiHeadAttention(16, heads=4, **settings)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"causal": True}, "causal=True; convert one with causal=False"),
        ({"position": "alibi"}, "position='alibi'; convert one with position=None"),
        ({"dropout": 0.1}, "dropout=0.1; convert one with dropout=0.0"),
        ({"context_dim": 8}, "context_dim=8; convert one with context_dim=16"),
    ],
)
def test_a_setting_the_other_kind_lacks_is_refused_by_name(settings: dict[str, object], named: str):
    with pytest.raises(ValueError, match=f"VideoMixtureOfBlock: a layer with {named}"):
        converted(VideoMixtureOfBlock, plain(**settings))


def test_settings_parameters_type_and_mode_are_taken_over():
    layer = plain(head_dim=6, bias=True, dtype=torch.float64).eval()
    made = converted(VideoMixtureOfBlock, layer, threshold=0.5)
    assert (made.heads, made.head_dim, made.threshold, made.training) == (4, 6, 0.5, False)
    for name, value in layer.state_dict().items():
        assert torch.equal(made.state_dict()[name], value), name
