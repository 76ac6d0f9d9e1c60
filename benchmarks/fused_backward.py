"""What updating each weight inside the backward pass saves: peak memory of a full fine-tune's steps on the CPU.

    python benchmarks/fused_backward.py             # writes results/fused_backward.json; some ten minutes

Each case is trained for three steps by the trainer's own loop in a process of its own, with and without, and the ratio
of the two peaks is printed. The network has SDXL's structure, checkpointed, and WIDTH (96 of SDXL's 320) channels in
its first block; a piece is as much of it as a piece of SDXL is of SDXL.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from gesso import stages
from gesso.config.optimizer import Optimizer
from gesso.config.run import Training
from gesso.core.batch import Batch, Geometry
from gesso.core.provenance import provenance
from gesso.core.random import Draws
from gesso.core.runtime import Runtime
from gesso.training import in_backward, loop, optim, rounding

RESULT = Path(__file__).parent / "results" / "fused_backward.json"
SDXL, STEPS = 2_567_000_000, 3
CASES = {
    "float32 weights, adamw": ("float32", "adamw"),
    "bf16 weights, adamw": ("bfloat16", "adamw"),
    "float32 weights, adafactor": ("float32", "adafactor"),
}


def network(width: int) -> UNet2DConditionModel:
    """SDXL's UNet, every depth kept, narrow, with gradient checkpointing."""
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(width, 2 * width, 4 * width),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(1, 2, 4),
        cross_attention_dim=6 * width,
        use_linear_projection=True,
        norm_num_groups=8,
    )
    unet.enable_gradient_checkpointing()
    return unet


class Noise:
    """A stream of steps of one sample."""

    steps_per_epoch = STEPS

    def window(self, step: int) -> Iterator[Batch]:
        """One batch of one sample."""
        latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(step))
        one, place = torch.ones(1), (Geometry(128, 128, 0, 0, 128, 128),)
        yield Batch(latents, latents, one, one, place, ("",), None, ("noise",), Draws(0, 0, ()))

    def window_size(self, step: int) -> int:  # noqa: ARG002
        """One sample."""
        return 1


def measure(width: int, dtype: torch.dtype, name: str, *, fused: bool) -> tuple[int, int]:
    """Trained weights, and bytes of the process at most, over some steps."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    unet, runtime = network(width).to(dtype), Runtime.detect("fp32", "cpu")
    parameters = dict(unet.named_parameters())
    count = sum(p.numel() for p in parameters.values())
    optim.PIECE = int(optim.PIECE * count / SDXL)
    spec = Optimizer(type=name)
    training = Training(steps=STEPS, learning_rate=1e-5, optimizer=spec, clip=None)
    group = optim.flat_group(spec, "unet", parameters, learning_rate=1e-5, keep_gradient=not fused)
    made = (in_backward if fused else rounding).build(spec, [group], seed=0)

    def loss(batch: Batch) -> Tensor:
        text = torch.ones(1, 8, 6 * width, dtype=dtype)
        answer = unet(batch.latents.to(dtype), torch.tensor([5]), text, return_dict=False)[0]
        return answer.float().square().mean((1, 2, 3))

    learner = loop.Learner([group], made, None, runtime.scaler(), after_step=lambda: None, at_once=fused)
    options: dict[str, Any] = {"actions": [], "emit": stages.ignore, "stopping": lambda: False}
    loop.fit(training, name="run", seed=0, loss=loss, learner=learner, stream=Noise(), runtime=runtime, **options)
    return count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--case", nargs=3, metavar=("TYPE", "OPTIMIZER", "WAY"), help="measure one in this process")
    args = parser.parse_args()
    if args.case is not None:
        dtype, name, way = args.case
        print(*measure(args.width, getattr(torch, dtype), name, fused=way == "fused"))
        return 0
    rows = {}
    for case, (dtype, name) in CASES.items():
        peaks = {}
        for way in ("plain", "fused"):
            command = [sys.executable, __file__, "--width", str(args.width), "--case", dtype, name, way]
            said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            count, peaks[way] = map(int, said.split())
        row = {"weights": count, **{f"{way}_peak_rss": peak for way, peak in peaks.items()}}
        rows[case] = row | {"ratio": round(peaks["fused"] / peaks["plain"], 3)}
        plain, fused = (peaks[way] / 2**20 for way in ("plain", "fused"))
        print(f"{case:28} {plain:6.0f} MiB after the pass, {fused:6.0f} inside: {rows[case]['ratio']:.2f}")
    record = {"provenance": provenance(), "settings": {"width": args.width, "steps": STEPS}, "peaks": rows}
    RESULT.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
