"""What updating each weight inside the backward pass would save: peak memory of a full fine-tune's steps on the CPU.

`python benchmarks/fused_backward.py [WIDTH]` prints a line for each variant, measured in a process of its own. The
model has SDXL's structure and WIDTH channels (of SDXL's 320) in its first block.
"""

from __future__ import annotations

import resource
import subprocess
import sys

import torch
from diffusers import UNet2DConditionModel
from torch import nn


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


def flat(parameters: list[nn.Parameter]) -> nn.Parameter:
    """One vector that the parameters are views of, with one gradient vector, as the trainer has them."""
    whole = nn.Parameter(torch.cat([p.detach().reshape(-1) for p in parameters]))
    whole.grad = torch.zeros_like(whole)
    sizes = [p.numel() for p in parameters]
    pieces = zip(parameters, whole.detach().split(sizes), whole.grad.split(sizes), strict=True)
    for parameter, values, gradient in pieces:
        parameter.data, parameter.grad = values.view(parameter.shape), gradient.view(parameter.shape)
    return whole


def measure(width: int, dtype: torch.dtype, *, fused: bool) -> str:
    """Three steps, and MiB of the process at most."""
    torch.manual_seed(0)
    unet = network(width).to(dtype)
    parameters = list(unet.parameters())
    optimizers = {p: torch.optim.AdamW([p], lr=1e-5, fused=True) for p in (parameters if fused else [flat(parameters)])}

    def update(parameter: nn.Parameter) -> None:
        optimizers[parameter].step()
        parameter.grad = None

    if fused:
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(update)
    for _ in range(3):
        noisy, text = torch.randn(1, 4, 16, 16, dtype=dtype), torch.randn(1, 8, 6 * width, dtype=dtype)
        unet(noisy, torch.tensor([5]), text, return_dict=False)[0].float().square().mean().backward()
        if not fused:
            for whole, optimizer in optimizers.items():
                optimizer.step()
                assert whole.grad is not None
                whole.grad.zero_()
    count, peak = sum(p.numel() for p in parameters), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    how = "inside the backward pass" if fused else "after it"
    return f"{str(dtype).removeprefix('torch.')}, updated {how}: {count / 1e6:.0f} M parameters, peak {peak:.0f} MiB"


if __name__ == "__main__":
    if len(sys.argv) == 4:
        print(measure(int(sys.argv[1]), getattr(torch, sys.argv[2]), fused=sys.argv[3] == "fused"))
    else:
        chosen = sys.argv[1] if len(sys.argv) == 2 else "96"
        for name in ("float32", "bfloat16"):
            for way in ("plain", "fused"):
                subprocess.run([sys.executable, __file__, chosen, name, way], check=True)
