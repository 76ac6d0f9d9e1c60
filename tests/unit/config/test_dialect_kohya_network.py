"""sd-scripts' network options: networks.lora and lycoris.kohya with their arguments, strengths and files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from kohya_helpers import load

HEAD = """
pretrained_model_name_or_path = "a/b"
resolution = 1024
max_train_steps = 10
train_data_dir = "/x"
network_train_unet_only = true
"""


@pytest.mark.parametrize(
    ("lines", "wanted"),
    [
        (
            ['network_module = "networks.lora"', "network_dim = 8", 'network_args = ["conv_dim=4"]'],
            {"type": "lora", "rank": 8, "alpha": 1, "conv_rank": 4, "conv_alpha": 1, "targets": "attention-mlp"},
        ),
        (
            ['network_args = ["rank_dropout=0.1", "module_dropout=0.2", "loraplus_lr_ratio=16", "conv_dim=0"]'],
            {"rank_dropout": 0.1, "module_dropout": 0.2, "lora_plus_ratio": 16, "conv_rank": None},
        ),
        (
            ['network_module = "lycoris.kohya"', "network_dim = 8", 'network_args = ["algo=lokr", "factor=8"]'],
            {"type": "lokr", "rank": 8, "alpha": 1, "factor": 8, "targets": "all"},
        ),
        (
            [
                'network_module = "lycoris.kohya"',
                "network_dim = 8",
                "network_alpha = 4",
                'network_args = ["algo=loha", "conv_dim=2", "use_tucker=True", "preset=attn-mlp"]',
            ],
            {
                "type": "loha",
                "alpha": 4,
                "conv_rank": 2,
                "conv_alpha": 4,
                "tucker": True,
                "targets": "attention-mlp",
            },
        ),
        (
            ['network_module = "lycoris.kohya"', 'network_args = ["algo=lokr", "full_matrix=True"]'],
            {"type": "lokr", "rank": 4096, "alpha": None},
        ),
        (
            ['network_module = "lycoris.kohya"', 'network_args = ["algo=locon", "dora_wd=True", "preset=attn-only"]'],
            {"type": "lora", "dora": True, "targets": "attention"},
        ),
        (
            ["scale_weight_norms = 1.0", 'network_weights = "/old.safetensors"'],
            {"max_norm": 1.0, "init_from": "/old.safetensors"},
        ),
    ],
)
def test_networks(lines: list[str], wanted: dict[str, Any], tmp_path: Path) -> None:
    adapter = load("\n".join([HEAD, *lines]), tmp_path).run.adapter.model_dump()
    assert {key: adapter[key] for key in wanted} == wanted


def test_base_weights_are_fused(tmp_path: Path) -> None:
    more = 'base_weights = ["/one.safetensors", "/two.safetensors"]\nbase_weights_multiplier = [0.5]\n'
    fuse = load(HEAD + more, tmp_path).run.model.fuse
    assert [(one.path, one.weight) for one in fuse] == [("/one.safetensors", 0.5), ("/two.safetensors", 1.0)]
