"""Sliding windows: what is in sight, what is kept, and that it is full attention when the window is wide enough."""

from __future__ import annotations

import torch

from regard.nn import MultiHeadAttention, WindowAttention
from regard.testing.checks.decoding import state_bytes


def reach(layer, length: int) -> torch.Tensor:
    """Which inputs each output depends on."""
    x = torch.randn(1, length, layer.dim, requires_grad=True)
    rows = [torch.autograd.grad(layer(x)[0, row].sum(), x)[0][0].abs().sum(-1) > 0 for row in range(length)]
    return torch.stack(rows)


def test_a_causal_window_reaches_itself_and_the_tokens_before():
    seen = reach(WindowAttention(16, heads=2, window=3, causal=True), 8)
    index = torch.arange(8)
    distance = index[:, None] - index
    assert torch.equal(seen, (distance >= 0) & (distance < 3))


def test_a_window_reaches_half_of_it_to_each_side():
    seen = reach(WindowAttention(16, heads=2, window=4), 9)
    index = torch.arange(9)
    assert torch.equal(seen, (index[:, None] - index).abs() <= 2)


def test_sinks_are_in_sight_from_everywhere_after_them():
    seen = reach(WindowAttention(16, heads=2, window=2, sinks=2, causal=True), 8)
    assert seen[7].tolist() == [True, True, False, False, False, False, True, True]
    assert seen[0].tolist() == [True] + [False] * 7


def test_a_wide_window_is_full_attention():
    x = torch.randn(2, 30, 16)
    for causal in (False, True):
        window = WindowAttention(16, heads=2, window=60, causal=causal)
        full = MultiHeadAttention(16, heads=2, causal=causal)
        full.load_state_dict(window.state_dict())
        torch.testing.assert_close(window(x), full(x))


def test_the_state_stops_growing_at_window_and_sinks():
    layer = WindowAttention(16, heads=2, window=5, sinks=3, causal=True)
    state, sizes = layer.init_state(1), []
    with torch.no_grad():
        for _ in range(30):
            _, state = layer.step(torch.randn(1, 1, 16), state)
            sizes.append(state.key.shape[2])
    assert sizes[:9] == [1, 2, 3, 4, 5, 6, 7, 7, 7]
    assert sizes[-1] == 5 - 1 + 3
    assert state.length == 30
    assert state_bytes(state) == 2 * 7 * 16 * 4
