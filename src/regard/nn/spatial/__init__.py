"""Mechanisms over grids of positions."""
