"""What heads save: the decode step of latent attention after 8192 tokens, and 8 heads chosen out of 32."""

from __future__ import annotations

import torch
from torch import nn

from harness import Row, report, threads_argument, times
from regard.nn import LatentAttention, MixtureOfAttentionHeads, MultiHeadAttention
from regard.testing.checks.decoding import state_bytes

DIM, HEADS, CACHED = 512, 8, 8192
EXPERTS, CHOSEN, LENGTH = 32, 8, 2048


def decode() -> Row:
    """Against multi-head attention of the same width, whose cache is eight times as large."""
    torch.manual_seed(0)
    ours = LatentAttention(DIM, heads=HEADS, causal=True, latent_dim=96, rotary_dim=32)
    peer = MultiHeadAttention(DIM, heads=HEADS, causal=True, position="rotary")
    token, seen = torch.randn(1, 1, DIM), torch.randn(1, CACHED, DIM)
    states = [layer.step(seen, layer.init_state(1))[1] for layer in (ours, peer)]
    plain = LatentAttention(DIM, heads=HEADS, causal=True, latent_dim=96, rotary_dim=32, absorb=False)
    plain.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours.step(token, states[0])[0], plain.step(token, states[0])[0], rtol=1e-4, atol=1e-5)
    ours_seconds, peer_seconds = times(
        lambda: ours.step(token, states[0]), lambda: peer.step(token, states[1]), repeats=101, warmup=20
    )
    share = state_bytes(states[0]) / state_bytes(states[1])
    ratio, cost = peer_seconds / ours_seconds, ours.decode_cost(CACHED)
    detail: dict[str, float | str] = {"cache": f"{share:.4g} of its bytes", "FLOPs a byte": cost.intensity}
    case = f"mla, absorbed decode step after {CACHED} tokens, dim {DIM}"
    reached = ratio >= 1 and share <= 1 / 8
    return Row(case, "multi_head", ratio, "≥ 1×, cache ≤ 1/8", reached, ours_seconds, peer_seconds, detail)


def forward(layer: nn.Module, x: torch.Tensor):
    return lambda: layer(x)


def mixture() -> Row:
    """Against the same layer with all of its heads on."""
    torch.manual_seed(0)
    ours, peer = (
        MixtureOfAttentionHeads(DIM, heads=EXPERTS, active_heads=chosen, head_dim=64).eval()
        for chosen in (CHOSEN, EXPERTS)
    )
    x = torch.randn(1, LENGTH, DIM)
    with torch.no_grad():
        ours_seconds, peer_seconds = times(forward(ours, x), forward(peer, x), repeats=11, warmup=3)
    ratio = ours_seconds / peer_seconds
    case = f"mixture_of_heads, {CHOSEN} of {EXPERTS} heads, N={LENGTH}, forward, share of the time"
    return Row(case, f"all {EXPERTS} heads", ratio, "≤ 0.5×", ratio <= 0.5, ours_seconds, peer_seconds)


if __name__ == "__main__":
    threads_argument()
    with torch.no_grad():
        rows = [decode(), mixture()]
    report("heads", rows)
