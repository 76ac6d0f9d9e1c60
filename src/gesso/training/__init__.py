"""The loop and what it needs: policy, optimiser, average, checkpoints."""
