"""Every test draws the same numbers wherever and beside whatever it runs."""

import pytest
import torch


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Before fixtures of any scope, which draw too."""
    torch.manual_seed(0)
