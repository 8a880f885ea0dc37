"""torch.compile meets new lengths and batches without compiling anew for each."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import regard
from regard.ops.masks import Padding, Segments

CASES = [
    ("multi_head", {"position": "rotary"}),
    ("multi_head", {"position": "relative"}),
    ("window", {"window": 64}),
    ("sigmoid_attention", {}),
    ("lightning", {}),
]


# Without a mask least depends on the sizes; each of these is seconds of compilation.
@pytest.mark.parametrize("kind", [pytest.param("plain", marks=pytest.mark.slow), "padding", "segments"])
@pytest.mark.parametrize(("key", "options"), CASES)
def test_changing_sizes_compile_twice_at_most(key, options, kind):
    layer = regard.card(key).build(32, heads=4, pattern="causal self", **options)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for batch, length in ((2, 300), (3, 411), (4, 520)):
        x = torch.randn(batch, length, 32)
        masks = {
            "plain": None,
            "padding": Padding(torch.arange(1, batch + 1) * 20),
            "segments": Segments(torch.arange(length) // 100),
        }
        with torch.no_grad():
            torch.testing.assert_close(compiled(x, mask=masks[kind]), layer(x, mask=masks[kind]), rtol=1e-4, atol=1e-5)
    # Once for the first sizes as they are, once for any.
    assert counter.frame_count <= 2
