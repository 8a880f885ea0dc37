"""Mechanisms that change how heads are made and shared."""
