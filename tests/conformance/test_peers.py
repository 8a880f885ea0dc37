"""The suite finds what other libraries ship, and does not accuse what they have right."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any, ClassVar

import pytest
import torch
from correct import declares
from torch import Tensor, nn

from regard.catalogue import Contract
from regard.ops.masks import Padding
from regard.testing import check

x_transformers = pytest.importorskip("x_transformers")
if version("x-transformers") != "2.31.10":
    pytest.skip("what is found is what this release ships", allow_module_level=True)

LEAKS = ("future_changes_nothing", "future_has_no_gradient")
LEAKS_WITH_PADDING = ("future_changes_nothing_with_padding", "future_has_no_gradient_with_padding")
DECODING = ("step_equals_forward", "segments_equal_forward")


class Peer(nn.Module):
    """One decoder layer of x-transformers behind our interface."""

    options: ClassVar[dict[str, Any]] = {}

    def __init__(self, dim: int, *, heads: int = 4, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        layers = x_transformers.Decoder(dim=dim, depth=1, heads=heads, attn_dim_head=dim // heads, **self.options)
        self.layers = layers.to(device=device, dtype=dtype)

    def forward(self, x: Tensor, *, mask: Padding | None = None) -> Tensor:
        real = None if mask is None else torch.arange(x.shape[1]) < mask.lengths[:, None]
        return self.layers(x, mask=real)

    def init_state(self, batch: int) -> Any:
        return None

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        # The peer's cache takes one token at a time.
        outputs = []
        for token in x.split(1, dim=1):
            out, state = self.layers(token, cache=state, input_not_include_cache=True, return_hiddens=True)
            outputs.append(out)
        return torch.cat(outputs, dim=1), state


CONTRACT = Contract(
    input="tokens",
    patterns=("causal self",),
    memory="n*m",
    padding=True,
    step=True,
    state="linear",
    # Its softmax is float32 whatever it is given.
    dtypes=(torch.float32,),
)


@declares(CONTRACT)
class Plain(Peer):
    """As it comes."""


@declares(CONTRACT)
class OrthogonalValues(Peer):
    options: ClassVar[dict[str, Any]] = {"attn_orthog_projected_values": True}


@declares(CONTRACT)
class ShiftedTokens(Peer):
    options: ClassVar[dict[str, Any]] = {"shift_tokens": 1}


@declares(CONTRACT)
class DataDependentAlibi(Peer):
    options: ClassVar[dict[str, Any]] = {"attn_data_dependent_alibi": True}


def test_a_plain_decoder_is_not_accused() -> None:
    check(Plain, only=(*LEAKS, *LEAKS_WITH_PADDING, *DECODING, "samples_are_independent")).raise_for_failures()


@pytest.mark.parametrize("name", [*LEAKS, *LEAKS_WITH_PADDING])
def test_orthogonal_values_leak_the_future(name: str) -> None:
    (failure,) = check(OrthogonalValues, only=name).failures
    assert "before" in failure.message


@pytest.mark.parametrize("cls", [ShiftedTokens, DataDependentAlibi])
def test_a_cache_that_says_it_works_decodes_something_else(cls: type[nn.Module]) -> None:
    peer = cls(32)
    assert peer.layers.can_cache_kv
    check(cls, only=LEAKS).raise_for_failures()
    (failure,) = check(cls, only="step_equals_forward").failures
    assert "outputs of the steps: off by" in failure.message
