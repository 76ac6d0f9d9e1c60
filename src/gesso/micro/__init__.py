"""The embedded default: a small painted world, the micro models trained on it, their recipe, and the demo."""
