"""Engines and other libraries' kernels side by side: masks × lengths × forward, forward and backward."""
