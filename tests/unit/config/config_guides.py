"""YAML as two users' guides print it: a nested format with fragments, and a flat one."""

NESTED = """\
# Minimal DreamBooth LoRA config
model:
  base_model_id: "stabilityai/stable-diffusion-xl-base-1.0"
  finetune_method: "lora"  # or "full" or "dreambooth"
  resolution: 1024
  gradient_checkpointing: true
  enable_xformers: true

lora:
  rank: 64
  alpha: 64
  target_modules:
    - "to_q"
    - "to_k"
    - "to_v"
    - "to_out.0"

dataset:
  train_data_dir: "data/train"
  metadata_file: "metadata.jsonl"
  image_column: "image_path"
  caption_column: "prompt"

training:
  output_dir: "output/aldar_kose_lora"
  train_batch_size: 1
  gradient_accumulation_steps: 4
  num_epochs: 10
  max_train_steps: 500  # DreamBooth: start with 500 steps
  learning_rate: 1.0e-4
  mixed_precision: "fp16"
  lr_scheduler: "constant"
  lr_warmup_steps: 0
"""

CONSERVATIVE = """\
max_train_steps: 400-500
learning_rate: 1.0e-4
train_batch_size: 1
gradient_accumulation_steps: 4
"""

AGGRESSIVE = """\
max_train_steps: 800-1000
learning_rate: 5.0e-5
train_batch_size: 2
train_text_encoder: true  # Trains CLIP text encoders
"""

PRIOR = """\
prior_preservation:
  enabled: true
  weight: 1.0
  class_data_dir: "data/class_images"
  num_class_images: 200
  class_prompt: "a photo of a person"
"""

LORA = """\
lora:
  rank: 64           # Higher = more capacity (16-128)
  alpha: 64          # Usually same as rank
  target_modules:    # Which layers to adapt
    - "to_q"         # Query projection
    - "to_k"         # Key projection
    - "to_v"         # Value projection
    - "to_out.0"     # Output projection
    - "add_k_proj"   # SDXL additional projections
    - "add_v_proj"
  dropout: 0.0       # LoRA dropout (0.0-0.1)
"""

MEMORY = """\
model:
  gradient_checkpointing: true
  enable_xformers: true

training:
  mixed_precision: "fp16"
  train_batch_size: 1
  gradient_accumulation_steps: 8  # Effective batch size = 8
  use_8bit_adam: true
  enable_cpu_offload: true
"""

CACHE = "cache_latents: true\n"

WANDB = """\
logging:
  use_wandb: true
  wandb_project: "aldar-kose-training"
  wandb_run_name: "dreambooth-lora-v1"
"""

VALIDATION = """\
validation:
  validation_steps: 100
  num_validation_samples: 4
  validation_prompts:
    - "a photo of sks aldar in traditional kazakh clothing"
    - "portrait of sks aldar smiling"
    - "sks aldar in kazakh steppe landscape"
    - "cinematic shot of sks aldar at sunset"
"""

IDENTITY = """\
consistency:
  enable_identity_loss: true
  identity_loss_weight: 0.1
  face_model: "buffalo_l"
"""

OUT_OF_MEMORY = """\
# Enable all memory optimizations
model:
  gradient_checkpointing: true
  enable_xformers: true

training:
  train_batch_size: 1
  gradient_accumulation_steps: 8
  mixed_precision: "fp16"
  use_8bit_adam: true
  enable_cpu_offload: true

dataset:
  cache_latents: true
"""

SLOW = """\
# Speed optimizations
model:
  enable_xformers: true

dataset:
  cache_latents: true  # Pre-encode images
  num_workers: 4       # Parallel data loading

training:
  mixed_precision: "fp16"  # or "bf16" on A100
"""

TEXT_ENCODER = """\
text_encoder:
  train_text_encoder: true
"""

FLAT = """\
# Model settings
model_name: "stabilityai/stable-diffusion-xl-base-1.0"
vae_name: "madebyollin/sdxl-vae-fp16-fix"

# Dataset
dataset_name: "your-username/your-dataset"
caption_column: "text"
image_column: "file_name"

# LoRA settings
lora_rank: 8
lora_alpha: 16
lora_dropout: 0.1
lora_target_modules:
  - "to_k"
  - "to_q"
  - "to_v"
  - "to_out.0"

# Training hyperparameters
learning_rate: 1e-4
num_train_epochs: 100
train_batch_size: 1
gradient_accumulation_steps: 4
mixed_precision: "fp16"

# Output
output_dir: "./outputs"
save_steps: 500
save_total_limit: 5
"""
