"""The embedded default: a small painted world, the micro models trained on it, how they are made, and the demo."""
