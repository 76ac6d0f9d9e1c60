"""What is minimised. Each objective is one class; `AnyObjective` is the registry that the run file chooses from."""

from __future__ import annotations

from gesso.objectives.denoise import Denoise

AnyObjective = Denoise

__all__ = ["AnyObjective", "Denoise"]
