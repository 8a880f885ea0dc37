"""`find` and `attach`: the attention sites of a model, and the door they are routed through."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import wraps
from typing import Any
from weakref import WeakKeyDictionary

from jaxtyping import Int
from torch import Tensor, nn

from regard.ops.checks import require
from regard.sites.call import AttentionCall
from regard.sites.hosts.diffusers import Diffusers
from regard.sites.hosts.host import Host, Seat
from regard.sites.hosts.intercept import in_place_of
from regard.sites.hosts.regard import Regard
from regard.sites.hosts.torch_calls import TorchCalls
from regard.sites.hosts.transformers import Transformers
from regard.sites.site import Site, Sites, Unreached
from regard.sites.tokens import Tokens

HOSTS: tuple[Host, ...] = (Transformers(), Diffusers(), Regard(), TorchCalls())
"""The ways in, most exact first: the first that knows a module takes it."""

Instrument = Callable[[AttentionCall], AttentionCall]
"""Reads a call and returns it, changed or not."""

_LOOKS_LIKE_ATTENTION = re.compile(r"attention|attn", re.IGNORECASE)


def find(model: nn.Module, input_ids: Int[Tensor, "batch length"] | None = None, tokenizer: Any = None) -> Sites:
    """Every attention site of a model, and every attention module that cannot be reached.

    A model is any `torch.nn.Module`: of transformers, diffusers or timm, one of regard's own, or one that calls torch's
    attention. Nothing is run. See `regard.sites.hosts` for the ways in. With ``input_ids`` the result has `tokens`:
    which of them are text, image, video or special (`Tokens.of`).
    """
    found, unreached = _search(model)
    tokens = None if input_ids is None else Tokens.of(model, input_ids, tokenizer)
    return Sites(tuple(site for site, _, _ in found), unreached, tokens)


class Attached:
    """The open door: counts forward passes and hands every call to the instruments in order.

    Attributes:
        sites: what is routed.
        step: the number of the model's current forward pass; −1 before the first.
        called: the names of the sites that calls came from.
        tokens: which token is which.
    """

    def __init__(self, sites: Sites, instruments: tuple[Instrument, ...], tokens: Tokens | None) -> None:
        self.sites, self.tokens = sites, tokens
        self.step = -1
        self.called: set[str] = set()
        self._instruments = instruments

    def restart(self) -> None:
        """Count the next forward pass as step 0: call it before another prompt."""
        self.step = -1

    def read(self, call: AttentionCall, site: Site) -> AttentionCall:
        """The call after the instruments."""
        self.called.add(site.name)
        # An encoder may run before the model's own forward, for its first step.
        call = replace(call, site=site, step=max(self.step, 0), tokens=self.tokens)
        for instrument in self._instruments:
            call = instrument(call)
        return call


class _Relay:
    """What stands in an attention module's way: every door that is open on it, the outermost first."""

    def __init__(self) -> None:
        self.doors: list[tuple[Attached, Site]] = []

    def __call__(self, call: AttentionCall) -> Tensor:
        for door, site in self.doors:
            call = door.read(call, site)
        return call.output()


_relays: WeakKeyDictionary[nn.Module, _Relay] = WeakKeyDictionary()


@contextmanager
def attach(model: nn.Module, *instruments: Instrument, tokens: Tokens | None = None) -> Iterator[Attached]:
    """Route the attention of `model` through `instruments` as long as the context lasts.

    Instruments (`Capture`, `Edit`, or any function of an `AttentionCall` that returns one) are asked in order; a
    capture sees the changes made before it. With none, outputs are the host's own. After the context, however it ends,
    the model is what it was; contexts nest. ``tokens`` says which token is which, for selections by kind.

    Raises ValueError if the model has no attention that can be reached. Warns at the end of the context about sites
    whose module ran without a call of attention passing through the door.
    """
    found, unreached = _search(model)
    require(
        bool(found),
        "attach",
        f"{type(model).__name__} has no attention that can be reached"
        + "".join(f"; {each.name}: {each.reason}" for each in unreached[:3]),
        "sites.find(model).table() shows what was seen",
    )
    door = Attached(Sites(tuple(site for site, _, _ in found), unreached), instruments, tokens)
    ran: set[str] = set()
    with ExitStack() as stack:
        stack.enter_context(_counting(model, door))
        fresh: dict[Host, list[Seat]] = {}
        for site, module, host in found:
            hook = module.register_forward_hook(lambda *_, name=site.name: ran.add(name))
            stack.callback(hook.remove)
            relay = _relays.get(module)
            if relay is None:
                relay = _relays[module] = _Relay()
                stack.callback(_relays.pop, module)
                fresh.setdefault(host, []).append(Seat(site, module, relay))
            relay.doors.append((door, site))
            stack.callback(relay.doors.remove, (door, site))
        for host, seats in fresh.items():
            stack.enter_context(host.route(seats))
        yield door
    silent = sorted(ran - door.called)
    if silent:
        warnings.warn(
            f"attach: no call of attention came from {', '.join(silent[:5])}{' …' if silent[5:] else ''}: "
            "what the instruments say of these sites is nothing",
            stacklevel=3,
        )


@contextmanager
def _counting(model: nn.Module, door: Attached) -> Iterator[None]:
    """A step for every forward pass, and for every call of `step` of a model that decodes by one."""

    def begins(*_: object) -> None:
        door.step += 1

    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(begins).remove)
        own = getattr(model, "step", None)
        if callable(own):

            @wraps(own)
            def step(*args: object, **kwargs: object) -> object:
                begins()
                return own(*args, **kwargs)

            stack.enter_context(in_place_of(model, "step", step))
        yield


_Found = tuple[Site, nn.Module, Host]


def _search(model: nn.Module) -> tuple[list[_Found], tuple[Unreached, ...]]:
    reached: dict[str, _Found] = {}
    refused: dict[str, Unreached] = {}
    for name, module in model.named_modules():
        for host in HOSTS:
            described = host.describe(name, module, model)
            if described is None:
                continue
            if isinstance(described, str):
                refused[name] = Unreached(name, type(module).__name__, described)
            else:
                tower = re.split(r"\.\d+(?:\.|$)", name)[0]
                site = Site(name, tower, 0, 0, host=host.name, **vars(described))
                reached[name] = (site, module, host)
            break
    for name, module in model.named_modules():
        known = (*reached, *refused)
        around = any(other == name or other.startswith(f"{name}." if name else "") for other in known)
        inside = any(name.startswith(f"{other}.") for other in known)
        if _LOOKS_LIKE_ATTENTION.search(type(module).__name__) and not around and not inside:
            refused[name] = Unreached(name, type(module).__name__, "no host knows how it attends")
    return _numbered(list(reached.values())), tuple(refused.values())


def _numbered(found: list[_Found]) -> list[_Found]:
    depths = Counter((site.tower, site.kind) for site, _, _ in found)
    seen: Counter[tuple[str, str]] = Counter()
    numbered = []
    for site, module, host in found:
        place = (site.tower, site.kind)
        numbered.append((replace(site, layer=seen[place], depth=depths[place]), module, host))
        seen[place] += 1
    return numbered
