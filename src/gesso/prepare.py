"""The first stage of a run: pictures and captions become encodings and a stream of batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from gesso.adapters import Embedding
from gesso.config.run import RunConfig
from gesso.core.events import Progress, Warned
from gesso.core.folder import RunFolder
from gesso.core.runtime import Runtime
from gesso.core.seams import Emit, Parts
from gesso.data import index as dataset
from gesso.data import new_words, pairs
from gesso.data.cache import LatentCache, LiveLatents, LiveText, TextCache
from gesso.data.loader import HeldOut, Loader
from gesso.data.plan import Plan
from gesso.data.store import Store
from gesso.errors import UserError
from gesso.evaluation import class_images, preview
from gesso.evaluation import sample as sampling
from gesso.evaluation.preview import Previewer
from gesso.training.session import network_types, text_encoder_rates


@dataclass(frozen=True)
class Prepared:
    """The data of a run, encoded, and the networks that are still needed."""

    stream: Loader
    held_out: HeldOut
    samples: int
    previewer: Previewer | None
    parts: Parts
    vae_home: torch.device
    """Where the VAE waits between previews."""
    hashes: dict[str, str]


def prepare(
    run: RunConfig,
    folder: RunFolder,
    runtime: Runtime,
    tell: Emit,
    stopping: Callable[[], bool] = class_images.never,
) -> Prepared:
    """Index the pictures, plan every step, encode what is not cached yet, and let go of the encoders."""
    family = run.model
    class_images.complete(run, runtime, tell, stopping)
    index = dataset.build(run.data, progress=lambda done, all_: tell(Progress(0, "reading images", done, all_)))
    pairs.require(run, index.rows)
    plan = Plan.of(run, index.rows, multiple=family.latent_factor)
    if "prior" in run.objective.needs and not plan.has_prior:
        fix = "give a source role: prior; or write objective.prior: model and a class_prompt"
        raise UserError("there are no prior images", where="objective.prior", fix=fix)
    new_words.require(plan, run.tokens)
    for notice in [*index.notices, *plan.notices]:
        tell(Warned(0, notice))
    total = run.training.total_steps(plan.steps_per_epoch)
    hashes = {"data": index.fingerprint} | {name: family.fingerprint(name) for name in ("denoiser", "vae", "text")}

    parts = family.load({"vae", "text"}, dtype=network_types(run, runtime)[1], device=runtime.device)
    steps = range(total)
    tokenizers = family.taught(parts.tokenizers, run.tokens)
    for notice in new_words.notices(
        plan, run.tokens, partial(family.token_counts, tokenizers), alone=isinstance(run.adapter, Embedding)
    ):
        tell(Warned(0, notice))
    _warn_of_cut_captions(run, tokenizers, list(plan.texts()), tell)
    live_text = bool(text_encoder_rates(run) or run.tokens)
    latents: LatentCache | LiveLatents
    text: TextCache | LiveText | None = None
    if run.data.encoding == "live":
        encoders = replace(parts, text_encoders=list(parts.text_encoders), tokenizers=list(parts.tokenizers))
        latents = LiveLatents(family=family, parts=encoders, device=runtime.device, background=run.data.background)
        text = None if live_text else LiveText(family=family, parts=encoders)
    else:
        store = Store(dataset.cache_folder(run.data) / "encodings")
        latents = LatentCache(store, fingerprint=hashes["vae"], dtype=torch.float32, background=run.data.background)
        latents.fill(plan.renditions(steps), family=family, parts=parts, device=runtime.device, emit=tell)
        if not live_text:
            text = TextCache(store, fingerprint=hashes["text"], dtype=runtime.dtype)
            text.fill(plan.captions(steps), family=family, parts=parts, device=runtime.device, emit=tell)

    shots = preview.shots(run)
    embeddings = sampling.encode(family.pipeline(parts), shots) if shots and not live_text else None
    previewer = Previewer(shots, embeddings, folder, model=family.base) if shots else None
    decodes = "pixels" in run.objective.needs
    vae_home = runtime.device if decodes or run.data.encoding == "live" else torch.device("cpu")
    parts.vae = parts.vae.to(vae_home) if (previewer or decodes) and parts.vae else None
    if not live_text:
        parts.text_encoders, parts.tokenizers = [], []
    runtime.release()
    patience = 3600.0 if run.data.encoding == "live" else 120.0  # encoding a window on a CPU is slow, not stuck
    stream = Loader(
        plan, latents=latents, text=text, family=family, workers=run.data.workers, stop=total, patience=patience
    )
    held_out = stream.validation_batches(run.validation.timesteps)
    return Prepared(stream, held_out, plan.visits_per_epoch, previewer, parts, vae_home, hashes)


def _warn_of_cut_captions(run: RunConfig, tokenizers: Sequence[Any], captions: Sequence[str], tell: Emit) -> None:
    if cut := run.model.overlong(tokenizers, captions):
        example = cut[0][:60]
        tell(
            Warned(
                0,
                f"{len(cut)} of {len(captions)} captions are longer than the text encoders read and lose their "
                f"end, such as '{example}...'. Shorten them, or set model.long_prompts to chunk",
            )
        )
