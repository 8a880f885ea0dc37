"""diffusers models: their attention modules leave the work to a processor, which calls torch's attention."""

from __future__ import annotations

from torch import nn

from regard.sites.hosts.code import describe
from regard.sites.hosts.host import Description
from regard.sites.hosts.torch_calls import TorchCalls
from regard.sites.site import Kind


class Diffusers(TorchCalls):
    """Attention modules with a processor."""

    name = "diffusers"

    def describe(self, name: str, module: nn.Module, model: nn.Module) -> Description | str | None:
        processor = getattr(module, "processor", None)
        if not type(module).__module__.startswith("diffusers.") or processor is None or not hasattr(module, "heads"):
            return None
        backend = getattr(processor, "_attention_backend", None)
        if backend is not None and "native" not in str(getattr(backend, "value", backend)):
            return f"attention backend {backend!r} is not torch's own; model.set_attention_backend('native')"
        if "Sliced" in type(processor).__name__:
            return "a sliced processor computes a few heads at a time; model.set_attn_processor(AttnProcessor())"
        if "XFormers" in type(processor).__name__:
            return "xformers is not torch's own attention; disable_xformers_memory_efficient_attention()"
        return describe(name, module, _kind(module))


def _kind(module: nn.Module) -> Kind | None:
    """Two sequences in one: by projections of its own for the second, or (Flux's single blocks) none at the end."""
    if getattr(module, "added_kv_proj_dim", None) is not None or getattr(module, "pre_only", False):
        return "joint"
    crosses = getattr(module, "is_cross_attention", None)
    if crosses is None:
        return None
    return "cross" if crosses else "self"
