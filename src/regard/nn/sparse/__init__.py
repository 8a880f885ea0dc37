"""Mechanisms that look at some of the keys."""
