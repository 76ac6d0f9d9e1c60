"""The registry of model families: a family is one file and one line here."""

from gesso.families.sdxl import SDXL

AnyFamily = SDXL

__all__ = ["SDXL", "AnyFamily"]
