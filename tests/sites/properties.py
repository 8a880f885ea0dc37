"""What the door promises of every family, one function each; each raises AssertionError where it does not hold."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from regard import sites
from regard.sites.attach import _relays
from regard.sites.call import AttentionCall, Heads, RowChange, mix
from tests.sites.families import Family

EXACT, CLOSE = 1e-6, 1e-5
"""Without instruments; and where weights are computed beside the host's kernel, in float32, in another order."""


@dataclass
class Running:
    """A family's model, built when first asked for."""

    family: Family

    @cached_property
    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.family.build().eval()

    @cached_property
    def inputs(self) -> dict[str, Any]:
        return self.family.inputs()

    @cached_property
    def plain(self) -> Tensor:
        return self()

    def __call__(self, *instruments: sites.Instrument) -> Tensor:
        """The model's output without a door, or with instruments attached."""
        with torch.no_grad():
            if not instruments:
                return self.family.output(self.model(**self.inputs))
            with sites.attach(self.model, *instruments):
                return self.family.output(self.model(**self.inputs))


def unchanged(call: AttentionCall) -> AttentionCall:
    return call


def found(running: Running) -> None:
    """Every site is listed with its heads, by kind, and nothing that looks like attention is left over."""
    seen = sites.find(running.model)
    kinds = [site.kind for site in seen]
    assert {kind: kinds.count(kind) for kind in kinds} == running.family.sites
    assert all(site.heads % site.key_heads == 0 and site.head_dim > 0 for site in seen)
    assert not seen.unreached


def parity(running: Running) -> None:
    """With nothing attached the output is the untouched model's."""
    with torch.no_grad(), sites.attach(running.model) as attached:
        out = running.family.output(running.model(**running.inputs))
    assert attached.called == {site.name for site in attached.sites}
    if running.family.exact:
        assert torch.equal(out, running.plain)
    _same(out, running.plain, EXACT)


def capture(running: Running) -> None:
    """Weights read beside the host's kernel, times the values, are what the host's kernel answers."""
    read: set[str] = set()

    def compare(call: AttentionCall) -> AttentionCall:
        weights = call.weights(slice(0, call.queries))
        assert weights.shape == (call.batch, call.site.heads, call.queries, call.keys)
        # A padded query may attend to nothing: its weights are zeros, its answer the host's own affair.
        rows = (weights.sum(-1) > 0.5)[..., None]
        _same(mix(weights, call.value) * rows, call.attend(None) * rows, CLOSE)
        part = call.weights(slice(1, 3), [call.site.heads - 1])
        assert torch.allclose(part, weights[:, -1:, 1:3], atol=1e-6)
        read.add(call.site.name)
        return call

    assert torch.equal(running(compare), running(unchanged))
    assert read == {site.name for site in sites.find(running.model)}


def logits(running: Running) -> None:
    """A bias on the host's kernel gives what the same bias gives on written-out logits, and is seen in the output."""

    def rows(call: AttentionCall) -> AttentionCall:
        bias = _bias(call)

        def change(values: Tensor, rows: slice, heads: Heads) -> Tensor:
            return values + bias

        return call.change_logits(RowChange(_all_rows(call), change))

    on_kernel = running(lambda call: call.add(_bias(call)))
    _same(on_kernel, running(rows), CLOSE)
    assert (on_kernel - running.plain).abs().max() > 1e-4


def weights(running: Running) -> None:
    """Weights times a factor, normalised again, are a bias of the factor's logarithm."""

    def scale(call: AttentionCall) -> AttentionCall:
        factor = _bias(call).exp()

        def change(values: Tensor, rows: slice, heads: Heads) -> Tensor:
            scaled = values * factor
            total = scaled.sum(-1, keepdim=True)
            return scaled / total.masked_fill(total == 0, 1.0)

        return call.change_weights(RowChange(_all_rows(call), change))

    _same(running(scale), running(lambda call: call.add(_bias(call))), CLOSE)


def output(running: Running) -> None:
    """A head whose output is set to zero is a head whose weights are."""

    def silence_output(call: AttentionCall) -> AttentionCall:
        return call.change_output(lambda out: out * _without_first_head(out))

    def silence_weights(call: AttentionCall) -> AttentionCall:
        def change(values: Tensor, rows: slice, heads: Heads) -> Tensor:
            return values * _without_first_head(values)

        return call.change_weights(RowChange(_all_rows(call), change))

    silenced = running(silence_output)
    _same(silenced, running(silence_weights), CLOSE)
    assert (silenced - running.plain).abs().max() > 1e-4


def generate(running: Running) -> None:
    """Tokens are the same through the door, with padding and a cache, and queries go on where the last ones ended."""
    if not running.family.generates:
        return
    ends: dict[str, int] = {}

    def note(call: AttentionCall) -> AttentionCall:
        assert call.query_start == ends.get(call.site.name, 0)
        ends[call.site.name] = int(call.query_start) + call.queries
        assert call.site.kind != "self" or call.key_start + call.keys == ends[call.site.name]
        return call

    plain = decoded(running)
    with sites.attach(running.model, note):
        assert torch.equal(decoded(running), plain)
    assert len(plain.unique()) > 1
    assert len(ends) == len(sites.find(running.model))


def restored(running: Running) -> None:
    """After the context, after an exception, after nesting and beside another thread, everything is as it was."""
    plain, model = running.plain, running.model
    before = snapshot(model)
    with sites.attach(model, unchanged):
        running()
    assert snapshot(model) == before
    with suppress(ZeroDivisionError), sites.attach(model, lambda call: 1 // 0):
        running()
    assert snapshot(model) == before
    with sites.attach(model, unchanged):
        once = snapshot(model)
        with sites.attach(model, unchanged), torch.no_grad():
            running()
        assert snapshot(model) == once != before
    assert snapshot(model) == before
    _beside_another_thread(running)
    assert snapshot(model) == before
    assert torch.equal(running(), plain)


PROPERTIES: dict[str, Callable[[Running], None]] = {
    each.__name__: each for each in (found, parity, capture, logits, weights, output, generate, restored)
}


def gradients(running: Running) -> None:
    """Gradients of the parameters are those of the untouched model, and flow through changed weights too."""
    plain, through = _gradients(running), _gradients(running, unchanged)
    assert plain.keys() == through.keys()
    for name, gradient in plain.items():
        _same(through[name], gradient, CLOSE)

    def halve(call: AttentionCall) -> AttentionCall:
        return call.change_weights(RowChange(_all_rows(call), lambda values, rows, heads: values / 2))

    assert plain.keys() == _gradients(running, halve).keys()


def decoded(running: Running) -> Tensor:
    """Six more tokens, greedily."""
    model, inputs = running.model, running.inputs
    with torch.no_grad():
        if hasattr(model, "generate"):
            given = {name: value for name, value in inputs.items() if name != "decoder_input_ids"}
            return model.generate(**given, max_new_tokens=6, do_sample=False)
        answer, state = model.step(inputs["tokens"], model.init_state(len(inputs["tokens"])))
        tokens = [answer[:, -1:].argmax(-1)]
        for _ in range(5):
            answer, state = model.step(tokens[-1], state)
            tokens.append(answer.argmax(-1))
        return torch.cat(tokens, 1)


def snapshot(model: nn.Module) -> list[object]:
    """Everything about a model and its host's registries that the door could leave behind."""
    taken: list[object] = [sorted(AttentionInterface._global_mapping), sorted(AttentionMaskInterface._global_mapping)]
    taken += [torch.backends.mha.get_fastpath_enabled(), len(_relays)]
    for name, module in model.named_modules():
        config = getattr(vars(module).get("config"), "_attn_implementation_internal", None)
        taken.append((name, config, {key: _mark(value) for key, value in vars(module).items()}))
    for name, tensor in model.state_dict().items():
        taken.append((name, id(tensor.untyped_storage()), tensor._version, float(tensor.double().sum())))
    return taken


def _mark(value: Any) -> object:
    """Hooks, parameters and submodules one by one; a tensor that a host keeps for itself by its values."""
    if isinstance(value, dict):
        return {key: id(each) for key, each in value.items()}
    return value.tolist() if isinstance(value, Tensor) else id(value)


def _beside_another_thread(running: Running) -> None:
    other = replace(running)
    other.__dict__["model"] = copy.deepcopy(running.model)
    both, answers = threading.Barrier(2), {}

    def work(name: str, mine: Running) -> None:
        def wait(call: AttentionCall) -> AttentionCall:
            return call.change_output(lambda out: out * (2.0 if name == "a" else 3.0))

        both.wait()
        with sites.attach(mine.model, wait):
            both.wait()
            answers[name] = mine()

    threads = [threading.Thread(target=work, args=each) for each in (("a", running), ("b", other))]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    for name, factor in (("a", 2.0), ("b", 3.0)):
        alone = running(lambda call, factor=factor: call.change_output(lambda out: out * factor))
        assert torch.equal(answers[name], alone)


def _gradients(running: Running, *instruments: sites.Instrument) -> dict[str, Tensor]:
    model = running.model
    with _watched(model, instruments):
        running.family.output(model(**running.inputs)).square().mean().backward()
    found = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@contextmanager
def _watched(model: nn.Module, instruments: tuple[sites.Instrument, ...]):
    if not instruments:
        yield
        return
    with sites.attach(model, *instruments):
        yield


def _bias(call: AttentionCall) -> Tensor:
    """Another number for every head and key."""
    generator = torch.Generator().manual_seed(call.keys)
    return torch.randn(1, call.site.heads, 1, call.keys, generator=generator)


def _without_first_head(values: Tensor) -> Tensor:
    return (torch.arange(values.shape[1]) > 0).to(values.dtype)[:, None, None]


def _all_rows(call: AttentionCall) -> Tensor:
    return torch.ones(call.queries, dtype=torch.bool)


def _same(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    scale = max(1.0, float(theirs.abs().max()))
    assert float((ours - theirs).abs().max()) <= tolerance * scale


def cells(family: Family) -> list[str]:
    """What a table says of a family of which every property holds."""
    said = dict.fromkeys(PROPERTIES, "yes") | family.notes
    return list((said if family.generates else said | {"generate": "no text"}).values())
