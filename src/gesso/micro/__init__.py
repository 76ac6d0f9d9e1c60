"""The embedded default: a small painted world, the micro models trained on it, their recipe, and the demo."""

import os

# Before torch is loaded, or it has no effect. Threads that spin while they wait for one another make networks this
# small many times slower wherever anything else runs on the machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
