"""Job files of ai-toolkit: every key is taken, refused or reported, with its line."""

from __future__ import annotations

from typing import Any

import pytest
from aitoolkit_helpers import BASE, convert
from dialect_helpers import at, lines_of

from gesso.config import document
from gesso.config.dialects import aitoolkit_tables as tables

# Every key with a value that asks for something, and what becomes of it: our key and value, or a word of the reason why
# it has no effect (!) or of the refusal (?).
KEYS: dict[str, dict[str, tuple[Any, str]]] = {
    "network": {
        "type": ("lora", "adapter.type=lora"),
        "linear": (8, "adapter.rank=8"),
        "rank": (8, "adapter.rank=8"),
        "linear_alpha": (4, "adapter.alpha=4"),
        "alpha": (4, "adapter.alpha=4"),
        "conv": (16, "adapter.conv_rank=16"),
        "conv_alpha": (16, "!belongs to conv"),
        "dropout": (0.1, "adapter.dropout=0.1"),
        "lokr_full_rank": (True, "!lokr"),
        "lokr_factor": (8, "!lokr"),
        "pretrained_lora_path": ("x", "adapter.init_from=x"),
        "network_kwargs": ({"only_if_contains": ["up"]}, "?end of their name"),
        "transformer_only": (True, "!FLUX"),
    },
    "save": {
        "dtype": ("float16", "!float32"),
        "save_every": (7, "checkpoint.every=7"),
        "max_step_saves_to_keep": (2, "checkpoint.keep_last=2"),
        "save_format": ("diffusers", "!export"),
        "push_to_hub": (False, "--push-to-hub"),
        "hf_repo_id": ("me/it", "!push_to_hub is off"),
        "hf_private": (True, "!private"),
    },
    "train": {
        "batch_size": (2, "training.batch_size=2"),
        "steps": (9, "training.steps=9"),
        "gradient_accumulation": (4, "training.accumulation=4"),
        "gradient_accumulation_steps": (4, "training.accumulation=4"),
        "train_unet": (False, "?denoiser always trains"),
        "train_text_encoder": (True, "adapter.train_text_encoders=True"),
        "gradient_checkpointing": (False, "training.gradient_checkpointing=False"),
        "noise_scheduler": ("flowmatch", "?flow matching"),
        "timestep_type": ("sigmoid", "!flow matching"),
        "content_or_style": ("style", "objective.timesteps.type=beta"),
        "optimizer": ("adamw8bit", "training.optimizer.type=adamw8bit"),
        "optimizer_params": ({"weight_decay": 0.1}, "training.optimizer.weight_decay=0.1"),
        "lr": (1e-4, "training.learning_rate=0.0001"),
        "learning_rate": (1e-4, "training.learning_rate=0.0001"),
        "unet_lr": (1e-4, "training.learning_rate=0.0001"),
        "text_encoder_lr": (1e-5, "!do not train"),
        "lr_scheduler": ("cosine", "training.schedule.type=cosine"),
        "lr_scheduler_params": ({"x": 1}, "?no settings"),
        "warmup_steps": (100, "!no warm-up"),
        "lr_end": (1e-6, "training.schedule.floor=0.1"),
        "dtype": ("float16", "training.precision=fp16"),
        "mixed_precision": ("bf16", "training.precision=bf16"),
        "loss_type": ("mae", "objective.loss_type=l1"),
        "snr_gamma": (5, "?gamma / SNR"),
        "min_snr_gamma": (5, "objective.min_snr_gamma=5"),
        "noise_offset": (0.1, "objective.noise_offset=0.1"),
        "max_grad_norm": (2, "training.clip=2"),
        "min_denoising_steps": (100, "objective.timestep_low=0.1"),
        "max_denoising_steps": (899, "objective.timestep_high=0.9"),
        "skip_first_sample": (True, "!always drawn"),
        "disable_sampling": (True, "!no previews"),
        "unload_text_encoder": (True, "?without the captions"),
        "cache_text_embeddings": (True, "!always cached"),
        "reg_weight": (0.5, "!no data set has is_reg"),
        "diff_output_preservation": (True, "?preservation"),
        "diff_output_preservation_multiplier": (1.0, "!belongs to"),
        "diff_output_preservation_class": ("dog", "!belongs to"),
        "ema_config": ({"use_ema": True, "ema_decay": 0.9}, "training.ema.decay=0.9"),
        "validation_config": ({"resolution": 512}, "?folder"),
    },
    "model": {
        "name_or_path": ("a/b", "model.base=a/b"),
        "arch": ("sdxl", "model.family=sdxl"),
        "is_xl": (True, "model.family=sdxl"),
        **dict.fromkeys(tables.OTHER_MODELS, (True, "?only model so far")),
        "is_v_pred": (True, "model.prediction=v_prediction"),
        "vae_path": ("a/vae", "model.vae=a/vae"),
        "lora_path": ("x", "merged into the model"),
        "assistant_lora_path": ("x", "?distilled"),
        "quantize": (True, "?quantised base"),
        "qtype": ("qfloat8", "!quantize"),
        "quantize_te": (True, "?quantised text"),
        "qtype_te": ("qfloat8", "!quantize_te"),
        "low_vram": (True, "!leave the memory"),
        "layer_offloading": (True, "?offloading"),
        "compile": (True, "!speed"),
        "attn_masking": (True, "?FLUX"),
        "dtype": ("fp16", "!train.dtype"),
    },
    "sample": {
        "sampler": ("ddpm", "!own sampler"),
        "sample_every": (10, "preview.every=10"),
        "width": (640, "preview.width=640"),
        "height": (640, "preview.height=640"),
        "prompts": (["[trigger] x"], "preview.prompts=['sks x']"),
        "samples": ([{"prompt": "[trigger] y", "seed": 3}], "preview.prompts=['sks y']"),
        "neg": ("bad", "preview.negative=bad"),
        "seed": (5, "preview.seed=5"),
        "walk_seed": (False, "!seed + i"),
        "guidance_scale": (4, "preview.guidance=4"),
        "sample_steps": (12, "preview.inference_steps=12"),
    },
    "logging": {
        "log_every": (1, "!every step"),
        "use_wandb": (True, "trackers"),
        "project_name": ("p", "!Weights & Biases is off"),
        "run_name": ("r", "!Weights & Biases is off"),
        "use_ui_logger": (True, "!run folder"),
        "verbose": (True, "!run folder"),
    },
    "datasets": {
        "folder_path": ("/x", "data.sources.0.path=/x"),
        "dataset_path": ("/x", "data.sources.0.path=/x"),
        "mask_path": ("/m", "?masklabel"),
        "mask_min_value": (0.1, "objective.unmasked_weight=0.1"),
        "control_path": ("/c", "?control images"),
        "inpaint_path": ("/c", "?control images"),
        "caption_ext": ("caption", "data.sources.0.caption_extension=.caption"),
        "default_caption": ("[trigger] hare", "data.sources.0.concept=sks hare"),
        "trigger_word": ("ohwx", "data.sources.0.trigger=ohwx"),
        "caption_dropout_rate": (0.1, "data.captions.dropout=0.1"),
        "token_dropout_rate": (0.2, "data.captions.tag_dropout=0.2"),
        "shuffle_tokens": (True, "data.captions.shuffle=True"),
        "keep_tokens": (2, "data.captions.keep=2"),
        "resolution": ([512, 768], "data.sources.0.resolution=[512, 768]"),
        "num_repeats": (3, "data.sources.0.repeats=3"),
        "is_reg": (True, "data.sources.0.role=prior"),
        "prior_reg": (True, "?prior"),
        "network_weight": (0.5, "?loss_multiplier"),
        "loss_multiplier": (0.5, "data.sources.0.weight=0.5"),
        "flip_x": (True, "data.sources.0.flip=True"),
        "flip_y": (True, "?upside down"),
        "alpha_mask": (True, "data.sources.0.mask=alpha"),
        "cache_latents": (True, "!always cached"),
        "cache_latents_to_disk": (True, "!always cached"),
        "cache_text_embeddings": (True, "!always cached"),
        "buckets": (False, "data.buckets.enabled=False"),
        "bucket_tolerance": (32, "data.buckets.step=32"),
        "random_crop": (True, "data.sources.0.crop=random"),
        "num_frames": (8, "?images"),
        "shrink_video_to_frames": (True, "!images"),
        "controls": (["depth"], "?control images"),
    },
    "": {
        "type": ("slider", "?only sd_trainer"),
        "training_folder": ("out", "output=out/n"),
        "device": ("cpu", "training.device=cpu"),
        "trigger_word": ("abc", "data.sources.0.trigger=abc"),
        "performance_log_every": (10, "!always logged"),
        "sqlite_db_path": ("x", "!run folder"),
    },
}
ALL = [(block, key) for block, keys in KEYS.items() for key in keys]
SAME = {"dataset_path": "folder_path", "learning_rate": "lr"}


def test_the_tables_name_every_key() -> None:
    assert {block: set(keys) for block, keys in KEYS.items()} == {
        **{name: set(keys) for name, keys in tables.BLOCKS.items()},
        "datasets": set(tables.DATASET),
        "": set(tables.PROCESS),
    }


@pytest.mark.parametrize(("block", "key"), ALL)
def test_every_key(block: str, key: str) -> None:
    value, expected = KEYS[block][key]
    process = document.parse(document.emit(BASE), file="x").data
    if block == "datasets":
        process["datasets"][0].pop(SAME.get(key, key), None)
        process["datasets"][0][key] = value
    elif block:
        process.setdefault(block, {}).pop(SAME.get(key, key), None)
        process[block] = {**process[block], key: value}
        if key == "unet_lr":
            del process["train"]["lr"]
    else:
        process[key] = value
    converted = convert(process)
    said = [line for problem in converted.problems for line in lines_of(problem)]
    own = ".".join(part for part in ("config.process.0", f"{block}.0" if block == "datasets" else block, key) if part)
    report = converted.report
    entries = [e for part in (report.mapped, report.ignored, report.refused) for e in part if e.key.startswith(own)]
    assert entries
    assert all(e.line is not None for e in entries)
    if expected[0] == "?":
        assert any(expected[1:] in line and f"{own}" in line for line in said), said
    elif expected[0] == "!":
        assert any(expected[1:] in e.note for e in entries if e in report.ignored), entries
    elif "=" in expected:
        native, _, wanted = expected.partition("=")
        assert str(at(converted.data, native)) == wanted
        assert any(e.key.startswith(own) for e in report.mapped)
    else:
        assert any(expected in e.note for e in entries)
    if expected[0] != "?":
        assert not said
