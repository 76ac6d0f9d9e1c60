"""Every option of sd-scripts' SDXL trainers, and what it means here."""

from __future__ import annotations

from gesso.config.dialects import kohya
from gesso.config.dialects.rules import DIRECT, Alias, Direct, Ignored, Refused, Rule

PICTURES = {
    **{key: key for key in (*kohya.DATASET, *kohya.SUBSET, "alpha_mask")},
    "train_batch_size": "batch_size",
    "caption_extention": "caption_extension",
    "dataset_repeats": "num_repeats",
}
"""Options that describe images, by their name in a dataset file, which overrules them."""

_CACHED = Ignored("latents and text embeddings are always cached, and the cache is on disk")
_FLOAT32 = Refused("weights that train, and their gradients, are always float32")
_LATER = "comes in a later version"
_SPEED = Ignored("only changes the speed")
_STATE = Ignored("every checkpoint holds all that is needed to go on")
_STEPS = "is counted in optimiser steps here"
_SERVICE = Ignored("gesso says what it does on the terminal and in logs/")

_ALIASES = {
    "sdxl": "sdxl",
    "v2": "v2",
    "v_parameterization": "v_parameterization",
    "max_token_length": "max_token_length",
    "weighted_captions": "weighted_captions",
    "output_dir": "output_dir",
    "output_name": "output_name",
    "network_module": "network_module",
    "network_type": "network_module",
    "network_dim": "rank",
    "network_alpha": "lora_alpha",
    "network_args": "network_args",
    "base_weights": "base_weights",
    "base_weights_multiplier": "base_weights_multiplier",
    "network_train_unet_only": "network_train_unet_only",
    "learning_rate": "learning_rate",
    "unet_lr": "unet_lr",
    "text_encoder_lr": "text_encoder_lr",
    "optimizer_type": "optimizer",
    "use_8bit_adam": "use_8bit_adam",
    "optimizer_args": "optimizer_args",
    "max_grad_norm": "max_grad_norm",
    "lr_scheduler": "lr_scheduler",
    "lr_warmup_steps": "lr_warmup_steps",
    "lr_scheduler_num_cycles": "lr_num_cycles",
    "lr_scheduler_power": "lr_power",
    "max_train_steps": "max_train_steps",
    "steps": "max_train_steps",
    "max_train_epochs": "num_train_epochs",
    "mixed_precision": "mixed_precision",
    "xformers": "enable_xformers",
    "cache_text_encoder_outputs": "cache_text_encoder_outputs",
    "loss_type": "loss_type",
    "huber_schedule": "huber_schedule",
    "huber_c": "huber_c",
    "huber_scale": "huber_scale",
    "min_snr_gamma": "min_snr_gamma",
    "debiased_estimation_loss": "debiased_estimation_loss",
    "scale_v_pred_loss_like_noise_pred": "scale_v_pred_loss_like_noise_pred",
    "zero_terminal_snr": "zero_terminal_snr",
    "multires_noise_iterations": "multires_noise_iterations",
    "multires_noise_discount": "multires_noise_discount",
    "min_timestep": "timestep_low",
    "max_timestep": "timestep_high",
    "prior_loss_weight": "prior_loss_weight",
    "dataset_config": "dataset_config",
    "train_data_dir": "train_data_dir",
    "reg_data_dir": "reg_data_dir",
    "save_every_n_steps": "checkpointing_steps",
    "save_last_n_steps": "save_last_n_steps",
    "resume": "resume",
    "sample_prompts": "sample_prompts",
    "sample_every_n_steps": "sample_every_n_steps",
    "log_with": "report_to",
    "log_tracker_name": "wandb_project",
    "wandb_run_name": "wandb_run_name",
    "huggingface_repo_id": "hub_model_id",
    "huggingface_token": "hub_token",
}

_DIRECT: dict[str, Rule] = {
    "pretrained_model_name_or_path": DIRECT["base_model"],
    "vae": DIRECT["vae"],
    "network_dropout": Direct(
        "adapter.dropout", note="of what goes into the adapter; there, of what is between its two"
    ),
    "network_weights": Direct("adapter.init_from", "model"),
    "scale_weight_norms": Direct("adapter.max_norm"),
    "gradient_accumulation_steps": DIRECT["gradient_accumulation_steps"],
    "gradient_checkpointing": DIRECT["gradient_checkpointing"],
    "fused_backward_pass": Direct("training.fused_backward", "flag"),
    "noise_offset": DIRECT["noise_offset"],
    "ip_noise_gamma": DIRECT["input_perturbation"],
    "seed": DIRECT["seed"],
    "max_data_loader_n_workers": DIRECT["dataloader_num_workers"],
    "validate_every_n_steps": Direct("validation.every"),
}

_IGNORED: dict[str, Rule] = {
    **dict.fromkeys(("cache_latents", "cache_latents_to_disk", "cache_text_encoder_outputs_to_disk"), _CACHED),
    **dict.fromkeys(("vae_batch_size", "text_encoder_batch_size", "skip_cache_check"), _CACHED),
    **dict.fromkeys(("sdpa", "mem_eff_attn", "torch_compile", "dynamo_backend", "highvram", "lowram"), _SPEED),
    **dict.fromkeys(("persistent_data_loader_workers", "ddp_timeout", "ddp_gradient_as_bucket_view"), _SPEED),
    **dict.fromkeys(("ddp_static_graph", "disable_mmap_load_safetensors"), _SPEED),
    **dict.fromkeys(("save_state", "save_state_on_train_end", "save_last_n_steps_state"), _STATE),
    **dict.fromkeys(("save_last_n_epochs_state", "save_state_to_huggingface"), _STATE),
    **dict.fromkeys(("console_log_level", "console_log_file", "console_log_simple", "log_config"), _SERVICE),
    **dict.fromkeys(("logging_dir", "log_prefix", "log_tracker_config", "debug_dataset"), _SERVICE),
    **dict.fromkeys(("save_every_n_epochs", "save_n_epoch_ratio"), Ignored(f"saving {_STEPS}: checkpoint.every")),
    "save_last_n_epochs": Ignored(f"saving {_STEPS}: checkpoint.keep_last"),
    "sample_every_n_epochs": Ignored(f"drawing {_STEPS}: preview.every"),
    "validate_every_n_epochs": Ignored(f"measuring {_STEPS}: validation.every"),
    "max_validation_steps": Ignored("all held-out images are measured"),
    "sample_at_first": Ignored("the untrained model is always drawn"),
    "sample_sampler": Ignored("the model's own sampler is used"),
    "save_precision": Ignored("what was trained is kept in float32; gesso export writes other precisions"),
    "save_model_as": Ignored("adapters are safetensors"),
    "no_half_vae": Ignored("the VAE is always float32"),
    "clip_skip": Ignored("SDXL always reads the layer before the last"),
    "no_metadata": Ignored("every file says how it was made"),
    "training_comment": Ignored("every file says how it was made"),
    **dict.fromkeys(
        (f"metadata_{name}" for name in ("title", "author", "description", "license", "tags")),
        Ignored("every file says how it was made"),
    ),
    "config_file": Ignored("this is the file"),
    "output_config": Ignored("gesso config show writes a run file"),
    "huggingface_repo_type": Ignored("it is a model"),
    "huggingface_path_in_repo": Ignored("the files lie at the top"),
    "huggingface_repo_visibility": Ignored("repositories are private until you open them"),
    "async_upload": Ignored("uploading comes last"),
    "dynamo_mode": _SPEED,
    "tokenizer_cache_dir": Ignored("tokenizers come with the model"),
    "lr_decay_steps": Ignored("the schedule ends with the run"),
}

_REFUSED: dict[str, Rule] = {
    "full_fp16": _FLOAT32,
    "full_bf16": _FLOAT32,
    "fp8_base": Refused(f"an 8-bit base {_LATER}"),
    "fp8_base_unet": Refused(f"an 8-bit base {_LATER}"),
    "dim_from_weights": Refused("ranks are not read from a file", fix="write network_dim"),
    "network_train_text_encoder_only": Refused("the denoiser always trains"),
    "in_json": Refused("a JSON file of captions is not read", fix="write it as metadata.jsonl into the folder"),
    "conditioning_data_dir": Refused(f"ControlNet training {_LATER}"),
    "wandb_api_key": Refused("a key does not belong in a file", fix="run `wandb login`, or set WANDB_API_KEY"),
    "dataset_class": Refused("classes of your own are not loaded"),
    "masked_loss": Refused("masks in a folder of their own are not read", fix="set alpha_mask"),
    "adaptive_noise_scale": Refused(f"a noise offset that follows the image {_LATER}"),
    "noise_offset_random_strength": Refused(f"a random noise offset {_LATER}"),
    "ip_noise_gamma_random_strength": Refused(f"a random perturbation {_LATER}"),
    "v_pred_like_loss": Refused("it adds a share of the loss that v would have", fix="set min_snr_gamma"),
    "lr_scheduler_type": Refused("schedules of your own are not loaded"),
    "lr_scheduler_args": Refused("schedules have no arguments of their own"),
    "lr_scheduler_min_lr_ratio": Refused("belongs to a schedule that is not there", fix="set training.schedule.floor"),
    "lr_scheduler_timescale": Refused("belongs to a schedule that is not there"),
    "initial_epoch": Refused("a run starts at its beginning", off=(1,)),
    "initial_step": Refused("a run starts at its beginning"),
    "skip_until_initial_step": Refused("a run starts at its beginning"),
    "resume_from_huggingface": Refused("the state that sd-scripts saves cannot be continued here"),
    "deepspeed": Refused(f"DeepSpeed {_LATER}"),
    "fused_optimizer_groups": Refused("there is another way to it", fix="write fused_backward_pass = true"),
    "train_text_encoder": Refused("an option of full fine-tuning", fix="take network_train_unet_only out instead"),
    "block_lr": Refused("learning rates per block come in a later version"),
    "learning_rate_te1": Refused("an option of full fine-tuning", fix="write text_encoder_lr = [1e-5, 0]"),
    "learning_rate_te2": Refused("an option of full fine-tuning", fix="write text_encoder_lr = [0, 1e-5]"),
    **dict.fromkeys(
        ("clip_l", "clip_g", "t5xxl", "ae"), Refused("a part of SD 3 or FLUX; SDXL is the only model so far")
    ),
}

KEYS: dict[str, Rule] = {
    **{key: Ignored("") for key in PICTURES},
    **{key: Alias(name) for key, name in _ALIASES.items()},
    **_DIRECT,
    **_IGNORED,
    **_REFUSED,
}
"""All of them; those in `PICTURES` are read together."""
