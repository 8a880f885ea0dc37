"""Mechanisms that change how a score becomes a weight."""
