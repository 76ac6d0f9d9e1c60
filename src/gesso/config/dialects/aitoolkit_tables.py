"""Every key of ai-toolkit's job files, block by block, and what it means here."""

from __future__ import annotations

from gesso.config.dialects.rules import DIRECT, Alias, Direct, Ignored, Refused, Rule

_LATER = "comes in a later version"
_CACHED = Ignored("latents and text embeddings are always cached, and the cache is on disk")
_ONLY_SDXL = "SDXL is the only model so far"
_FLOW = "belongs to flow matching; SDXL has none"
_CONTROL = Refused(f"training with control images {_LATER}")
_KEEP = Refused(
    "it asks the model under captions whose trigger word is replaced; here it is asked under one prompt for the class",
    fix="take it out, and in a run file write objective: {type: dreambooth, prior: model, class_prompt: ...}",
)
_OF_KEEP = Ignored("belongs to diff_output_preservation")

PROCESS: dict[str, Rule] = {
    "type": Alias("process"),
    "training_folder": Alias("training_folder"),
    "device": Direct("training.device", "text"),
    "trigger_word": Alias("trigger"),
    "performance_log_every": Ignored("speed and memory are always logged"),
    "sqlite_db_path": Ignored("the run folder tells how the run is going"),
}

NETWORK: dict[str, Rule] = {
    "type": Alias("network"),
    "linear": Alias("linear"),
    "rank": Alias("linear"),
    "linear_alpha": Alias("linear_alpha"),
    "alpha": Alias("linear_alpha"),
    "conv": Alias("conv"),
    "conv_alpha": Alias("conv_alpha"),
    "dropout": Direct("adapter.dropout", note="of what goes into the adapter; there, of what is between its two"),
    "lokr_full_rank": Alias("lokr_full_rank"),
    "lokr_factor": Alias("lokr_factor"),
    "pretrained_lora_path": Direct("adapter.init_from", "model"),
    "network_kwargs": Alias("network_kwargs"),
    "transformer_only": Ignored("it chooses layers of FLUX and SD 3"),
}

KWARGS: dict[str, Rule] = {
    "only_if_contains": Refused("layers are chosen by the end of their name", fix="set adapter.targets"),
    "ignore_if_contains": Refused("layers are chosen by the end of their name", fix="set adapter.targets"),
}

SAVE: dict[str, Rule] = {
    "dtype": Ignored("what was trained is kept in float32; gesso export writes other precisions"),
    "save_every": Direct("checkpoint.every"),
    "max_step_saves_to_keep": Direct("checkpoint.keep_last"),
    "save_format": Ignored("checkpoints are as diffusers reads them; gesso export writes other formats"),
    "push_to_hub": Alias("push_to_hub"),
    "hf_repo_id": Alias("hub_model_id"),
    "hf_private": Ignored("repositories are private until you open them"),
}

DATASET: dict[str, Rule] = {
    "folder_path": Alias("folder_path"),
    "dataset_path": Alias("folder_path"),
    "mask_path": Refused("masks are not read from another folder", fix="put NAME-masklabel.png beside the images"),
    "mask_min_value": Direct("objective.unmasked_weight"),
    "control_path": _CONTROL,
    "inpaint_path": _CONTROL,
    "caption_ext": Alias("caption_ext"),
    "default_caption": Alias("default_caption"),
    "trigger_word": Alias("trigger_word"),
    "caption_dropout_rate": Direct("captions.dropout"),
    "token_dropout_rate": Direct("captions.tag_dropout"),
    "shuffle_tokens": Direct("captions.shuffle", "flag"),
    "keep_tokens": Direct("captions.keep"),
    "resolution": Alias("resolution"),
    "num_repeats": Direct("repeats"),
    "is_reg": Alias("is_reg"),
    "prior_reg": Refused(
        "a prior by the model itself is for all images",
        fix="take it out, and in a run file write objective: {type: dreambooth, prior: model, class_prompt: ...}",
    ),
    "network_weight": Refused(
        "a strength of the adapter of its own for some images is not there",
        off=(1,),
        fix="to let these images count for less, write loss_multiplier, which is the loss's weight",
    ),
    "loss_multiplier": Direct("weight"),
    "flip_x": Direct("flip", "flag"),
    "flip_y": Refused("pictures are not turned upside down"),
    "alpha_mask": Alias("alpha_mask"),
    "cache_latents": _CACHED,
    "cache_latents_to_disk": _CACHED,
    "cache_text_embeddings": _CACHED,
    "buckets": Alias("buckets"),
    "bucket_tolerance": Alias("bucket_tolerance"),
    "random_crop": Alias("random_crop"),
    "num_frames": Refused("images are all that is trained on", off=(1,)),
    "shrink_video_to_frames": Ignored("images are all that is trained on"),
    "controls": _CONTROL,
}

TRAIN: dict[str, Rule] = {
    "batch_size": Direct("training.batch_size"),
    "steps": Direct("training.steps"),
    "gradient_accumulation": Alias("accumulation"),
    "gradient_accumulation_steps": Alias("accumulation"),
    "train_unet": Alias("train_unet"),
    "train_text_encoder": Direct("adapter.train_text_encoders", "flag"),
    "gradient_checkpointing": Direct("training.gradient_checkpointing", "flag"),
    "noise_scheduler": Refused(_FLOW, off=("ddpm",), fix="write ddpm"),
    "timestep_type": Ignored(_FLOW),
    "content_or_style": Alias("content_or_style"),
    "optimizer": Alias("optimizer"),
    "optimizer_params": Alias("optimizer_params"),
    "lr": Alias("lr"),
    "learning_rate": Alias("lr"),
    "unet_lr": Alias("unet_lr"),
    "text_encoder_lr": Alias("te_lr"),
    "lr_scheduler": Alias("lr_scheduler"),
    "lr_scheduler_params": Alias("lr_scheduler_params"),
    "warmup_steps": Alias("warmup_steps"),
    "lr_end": Alias("lr_end"),
    "dtype": Alias("dtype"),
    "mixed_precision": Alias("dtype"),
    "loss_type": Alias("loss_type"),
    "snr_gamma": Refused("it weights all timesteps by gamma / SNR", fix="write min_snr_gamma"),
    "min_snr_gamma": DIRECT["snr_gamma"],
    "noise_offset": DIRECT["noise_offset"],
    "max_grad_norm": DIRECT["max_grad_norm"],
    "min_denoising_steps": Alias("min_denoising_steps"),
    "max_denoising_steps": Alias("max_denoising_steps"),
    "skip_first_sample": Ignored("the untrained model is always drawn, to compare with"),
    "disable_sampling": Alias("disable_sampling"),
    "unload_text_encoder": Refused("it trains without the captions", fix="write cache_text_embeddings: true"),
    "cache_text_embeddings": _CACHED,
    "reg_weight": Alias("reg_weight"),
    "diff_output_preservation": _KEEP,
    "diff_output_preservation_multiplier": _OF_KEEP,
    "diff_output_preservation_class": _OF_KEEP,
    "ema_config": Alias("ema_config"),
    "validation_config": Refused("held-out images have a folder", fix="set data.validation.path"),
}

EMA: dict[str, Rule] = {
    "use_ema": Direct("training.ema.enabled", "flag"),
    "ema_decay": Direct("training.ema.decay"),
}

OTHER_MODELS = ("is_v2", "is_v3", "is_flux", "is_pixart", "is_auraflow", "is_lumina2", "is_vega", "is_ssd")

MODEL: dict[str, Rule] = {
    "name_or_path": DIRECT["base_model"],
    "arch": Alias("arch"),
    "is_xl": Alias("is_xl"),
    **dict.fromkeys(OTHER_MODELS, Refused(_ONLY_SDXL, fix="write arch: sdxl, and name a model of SDXL")),
    "is_v_pred": Alias("is_v_pred"),
    "vae_path": DIRECT["vae"],
    "lora_path": Alias("lora_path"),
    "assistant_lora_path": Refused("belongs to distilled models of FLUX"),
    "quantize": Refused(f"a quantised base {_LATER}"),
    "qtype": Ignored("belongs to quantize"),
    "quantize_te": Refused(f"a quantised text encoder {_LATER}"),
    "qtype_te": Ignored("belongs to quantize_te"),
    "low_vram": Ignored("VAE and text encoders always leave the memory once all is encoded"),
    "layer_offloading": Refused(f"offloading {_LATER}"),
    "compile": Ignored("only changes the speed"),
    "attn_masking": Refused("belongs to FLUX"),
    "dtype": Ignored("train.dtype says it"),
}

SAMPLE: dict[str, Rule] = {
    "sampler": Ignored("the model's own sampler is used"),
    "sample_every": Direct("preview.every"),
    "width": Direct("preview.width"),
    "height": Direct("preview.height"),
    "prompts": Alias("prompts"),
    "samples": Alias("samples"),
    "neg": Direct("preview.negative", "text"),
    "seed": Direct("preview.seed"),
    "walk_seed": Ignored("picture i is always drawn with seed + i"),
    "guidance_scale": Direct("preview.guidance"),
    "sample_steps": Direct("preview.inference_steps"),
}
ONE_SAMPLE = ("seed", "width", "height", "neg")

LOGGING: dict[str, Rule] = {
    "log_every": Ignored("every step is logged"),
    "use_wandb": Alias("use_wandb"),
    "project_name": Alias("wandb_project"),
    "run_name": Alias("wandb_run_name"),
    "use_ui_logger": Ignored("the run folder tells how the run is going"),
    "verbose": Ignored("the run folder tells how the run is going"),
}

BLOCKS = {
    "network": NETWORK,
    "save": SAVE,
    "train": TRAIN,
    "model": MODEL,
    "sample": SAMPLE,
    "logging": LOGGING,
}
