"""The same comparison on a CUDA machine, with SDXL at its full size; every flag of `peers.py` can follow.

python benchmarks/gpu/run.py --diffusers-script train_text_to_image_lora_sdxl.py
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import peers

DEFAULTS = {
    "--device": ["cuda"],
    "--size": ["full"],
    "--resolution": ["1024"],
    "--batch-sizes": ["1", "4"],
    "--precisions": ["bf16"],
    "--steps": ["60"],
    "--warmup": ["10"],
    "--repeats": ["2"],
    "--threads": ["4"],
}
"""Put before the flags that are given, so that those win."""

if __name__ == "__main__":
    words = [word for flag, values in DEFAULTS.items() for word in (flag, *values)]
    peers.main([*words, *sys.argv[1:]])
