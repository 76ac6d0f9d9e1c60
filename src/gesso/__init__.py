"""Gesso fine-tunes diffusion image models."""

__version__ = "0.1.0"
