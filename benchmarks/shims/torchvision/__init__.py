"""Stand-in for torchvision: only what the diffusers text-to-image scripts use, for machines without torchvision."""

__version__ = "0.0.0+stand-in"
