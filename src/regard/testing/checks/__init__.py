"""The checks, a module per theme; `CHECKS` holds them all by name."""

from collections.abc import Mapping
from types import MappingProxyType

from regard.testing.checks import (
    abilities,
    causality,
    compilers,
    decoding,
    gradients,
    maps,
    masks,
    memory,
    outputs,
    padding,
    persistence,
    randomness,
    refusals,
    samples,
    side_effects,
)
from regard.testing.proof import Check

_THEMES = (
    abilities,
    outputs,
    gradients,
    causality,
    padding,
    masks,
    samples,
    decoding,
    maps,
    randomness,
    side_effects,
    persistence,
    compilers,
    memory,
    refusals,
)

CHECKS: Mapping[str, Check] = MappingProxyType(
    {check.name: check for theme in _THEMES for check in vars(theme).values() if isinstance(check, Check)}
)
