"""The map of a run: prepare -> train -> export, in plain order. Each stage is a few calls into the parts."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import torch

from gesso.adapters import Embedding, Full, LoRA
from gesso.config import files
from gesso.config.run import RunConfig
from gesso.core import checkpoints
from gesso.core.checkpoints import AVERAGE
from gesso.core.events import Event, Finished, RunStarted, Saved, Validated, Warned
from gesso.core.folder import RunFolder, write_atomic, write_json
from gesso.core.history import Measured
from gesso.core.provenance import provenance
from gesso.core.runtime import Precision, Runtime, out_of_memory_explained
from gesso.core.seams import Attached, Emit, Parts
from gesso.core.signals import stop_requests
from gesso.data.loader import HeldOut
from gesso.errors import Interrupted, NumericError, UserError
from gesso.evaluation import sample as sampling
from gesso.evaluation.preview import Previewer
from gesso.evaluation.sample import Shot
from gesso.export import embedding, hub, lora, merged, pipeline, single_file
from gesso.export.lora import About, Format
from gesso.prepare import Prepared, prepare
from gesso.trackers import RunLog
from gesso.training import checkpoint as saving
from gesso.training import loop, optim
from gesso.training import resume as continuity
from gesso.training.checkpoint import Snapshot
from gesso.training.loop import Action
from gesso.training.session import Session

Stopping = Callable[[], bool]


def ignore(event: Event) -> None:
    """An event sink that drops everything."""


def train(run: RunConfig, *, resume: str | None = None, accept: Collection[str] = (), emit: Emit = ignore) -> Path:
    """Carry out a run from its images to its LoRA file; returns the run folder.

    `resume` is "latest" or a checkpoint folder; `accept` names changed settings that are meant. Raises `UserError`
    and its kinds; `Interrupted` after a SIGTERM or Ctrl-C, with everything saved.
    """
    began = time.monotonic()
    folder = RunFolder(run.folder.expanduser().absolute())
    folder.prepare()
    with folder.held(), stop_requests() as stopping:
        store = saving.Store(folder.path, run.checkpoint, warn=lambda text: emit(Warned(0, text)))
        store.sweep()
        start = _starting_point(store, resume, emit)
        started_at = start.step if start else 0
        with RunLog(folder, run.trackers, name=run.name, started_at=started_at, stopping=stopping, emit=emit) as tell:
            runtime = Runtime.detect(run.training.precision, run.training.device)
            optim.require(run.training.optimizer, device=runtime.device.type)
            data = prepare(run, folder, runtime, tell, stopping)
            identity = continuity.identity(run, hashes=data.hashes)
            if start is not None:
                _check_identity(start, identity, accept, tell)
            _record(run, folder, identity)
            with out_of_memory_explained():
                session = Session.build(run, data.parts, runtime, fresh=start is None)
                if start is not None:
                    session.restore(start)
                last = _learn(run, session, data, store, identity, runtime, stopping, tell)
            if stopping():
                raise Interrupted(
                    f"stopped after step {session.learner.step} as asked; everything is saved",
                    where=str(folder.path),
                    fix=f"go on with: gesso train {folder.config} --resume latest",
                )
            trained, step = _trained(run, session, last), session.learner.step
            best, reason, components = session.best_step, session.stalled, session.components()
            session.release()
            del session  # the check of what is written needs its memory
            runtime.release()
            outputs = {
                "run folder": folder.path,
                "checkpoint": last,
                **_best(folder, best),
                **trained.finish(folder.path, runtime=runtime),
            }
            files_by_kind = {kind: str(path) for kind, path in outputs.items()}
            tell(Finished(step, time.monotonic() - began, runtime.peak_memory(), files_by_kind, reason, components))
    return folder.path


# Train: the loop, and what happens between its steps.


def _learn(
    run: RunConfig,
    session: Session,
    data: Prepared,
    store: saving.Store,
    identity: Mapping[str, Any],
    runtime: Runtime,
    stopping: Stopping,
    tell: Emit,
) -> Path:
    """Run the loop with its actions; returns the last checkpoint."""

    def validate(step: int) -> None:
        _validate(session, data.held_out, runtime, tell)
        if step and session.best_step == step:
            save(step)

    def show(step: int) -> None:
        if data.previewer is not None:
            _draw_previews(session, data.previewer, runtime, data.vae_home, step, tell)

    @cache  # the best so far is saved as soon as it is measured, and not again where a save is due
    def save(step: int) -> None:
        began = time.monotonic()
        path = store.save(session.snapshot(identity))
        tell(Saved(step, str(path), time.monotonic() - began))

    every = run.checkpoint.every
    actions = [
        Action(run.preview.every or every, show),
        Action(run.validation.every or every, validate),
        Action(every, save),
    ]
    total = run.training.total_steps(data.stream.steps_per_epoch)
    if session.learner.step >= total:
        tell(Warned(total, f"nothing is left to train: all {total} steps are done. Raise training.steps to go on"))
    with data.stream:
        tell(RunStarted(session.learner.step, total, data.samples, str(store.folder), run.model_dump(mode="json")))
        if session.learner.step == 0:
            validate(0)
            show(0)
        session.policy.train()
        loop.fit(
            run.training,
            name=run.name,
            seed=run.seed,
            loss=partial(run.objective.loss, session.policy),
            learner=session.learner,
            stream=data.stream,
            runtime=runtime,
            actions=actions,
            emit=tell,
            stopping=lambda: stopping() or bool(session.stalled),
        )
    last = store.folder / f"checkpoint-{session.learner.step}"
    if not last.exists():
        save(session.learner.step)
    return last


def _validate(session: Session, held_out: HeldOut, runtime: Runtime, tell: Emit) -> None:
    """Measure on the held-out images, if there are any, and remember it."""
    values, step = session.measure(held_out, runtime) if held_out else {}, session.learner.step
    session.require_measures(values)
    if values:
        tell(Validated.of(step, values, samples=len(held_out)))
        session.learner.history.append(Measured(step, values))


def _best(folder: RunFolder, step: int | None) -> dict[str, Path]:
    return {} if step is None else {"best checkpoint": folder.checkpoint(step)}


Result = lora.Trained | pipeline.Trained | embedding.Trained | embedding.WithLoRA


def _trained(run: RunConfig, session: Session, last: Path) -> Result:
    """The result of a run, as pictures show it."""
    with session.as_sampled():
        if isinstance(run.adapter, Full):
            _, weights = sampling.trained(str(last))
            return pipeline.Trained.of(run, session.parts, weights)
        return _adapted(run, session.parts, session.adapter)


def _adapted(run: RunConfig, parts: Parts, adapter: Attached) -> lora.Trained | embedding.Trained | embedding.WithLoRA:
    if isinstance(run.adapter, Embedding):
        return embedding.Trained.of(run, parts, adapter)
    matrices = lora.Trained.of(run, parts, adapter)
    return embedding.WithLoRA(matrices, embedding.Trained.of(run, parts, adapter)) if run.tokens else matrices


def _draw_previews(
    session: Session, previewer: Previewer, runtime: Runtime, vae_home: torch.device, step: int, tell: Emit
) -> None:
    """Draw with the model as it is, then put everything back; a picture that fails does not stop the run."""
    parts = session.parts
    assert parts.vae is not None
    parts.vae.to(runtime.device)
    try:
        with session.as_sampled():
            tell(previewer.draw(session.run.model.pipeline(parts), step))
    except NumericError as error:
        tell(Warned(step, f"no previews at step {step}: {error.what}"))
    finally:
        parts.vae.to(vae_home)
        runtime.release()


# Use: pictures and files from what was trained.


def sample(
    target: str,
    *,
    checkpoint: str | None = None,
    prompts: Sequence[str],
    loras: Sequence[tuple[str, float]] = (),
    negative: str = "",
    seed: int = 0,
    steps: int = 25,
    guidance: float = 7.0,
    width: int | None = None,
    height: int | None = None,
    count: int = 1,
    output: Path = Path("out.png"),
    device: str | None = None,
    precision: Precision | None = None,
) -> list[Path]:
    """Draw `count` pictures of each prompt; returns their files, and last a grid when there are several.

    `target` is a run, a checkpoint or a model, `checkpoint` which one of a run (see `checkpoints.chosen`); picture i of
    all uses seed + i. Nothing is written over: beside an out.png the next is out-2.png.
    """
    runtime = Runtime.for_inference(precision, device)
    target = target if checkpoint is None else str(checkpoints.chosen(Path(target), checkpoint))
    pipe, label = sampling.open_pipeline(target, loras=loras, runtime=runtime)
    side = pipe.default_sample_size * pipe.vae_scale_factor
    shots = [
        Shot(prompt, negative, seed + i, steps, guidance, width or side, height or side)
        for i, prompt in enumerate(prompt for prompt in prompts for _ in range(count))
    ]
    several = len(shots) > 1
    pictures = sampling.draw(pipe, shots)
    files = sampling.unused(output, len(shots))
    for file, shot, picture in zip(files, shots, pictures, strict=False):
        sampling.save_png(picture, file, sampling.settings(shot, pipeline=pipe, model=label))
    if several:
        sheet = sampling.grid(pictures, columns=count if count > 1 else 4, labels=[shot.prompt for shot in shots])
        sampling.save_png(sheet, files[-1], {"prompts": list(prompts), "seed": seed, "model": label})
    return files


def export(
    target: str,
    *,
    checkpoint: str | None = None,
    format: Format | Literal["merged", "single-file"] | None = None,
    output: Path | None = None,
    use_ema: bool | None = None,
    precision: Precision | None = None,
    hub_repo: str | None = None,
    device: str | None = None,
) -> Path:
    """Write what a run or checkpoint holds: a LoRA as one file, a whole model as a folder or as one file.

    An adapter becomes a whole model with "merged" (a diffusers folder) or "single-file"; `format` empty is what most
    readers of its kind know. Each is proven by loading it as its readers do. New words have a file each in a folder,
    beside the LoRA where there is one. `precision` empty is fp16, and fp32 for words; `use_ema` empty takes what the
    run samples with. With `hub_repo` a LoRA file is pushed with a model card.
    """
    target = target if checkpoint is None else str(checkpoints.chosen(Path(target), checkpoint))
    run, weights = sampling.trained(target, use_ema=use_ema)
    format = format or ("diffusers" if isinstance(run.adapter, Full | Embedding) else lora.suited(run.adapter))
    _refuse_push(run, format, hub_repo)
    if isinstance(run.adapter, Full | Embedding):
        whole = isinstance(run.adapter, Full)
        _refuse_lora_options(format, hub_repo, "the whole model" if whole else "new words alone")
    if format in ("merged", "single-file") and run.tokens:
        what = "new words have no place in a model's own files"
        raise UserError(what, where="--format", fix="leave it out: the words are written beside what else was trained")
    runtime = Runtime.for_inference(run.training.precision, device or run.training.device)
    path = output or _default_place(run, weights.parent if weights.name == AVERAGE else weights, format)
    if path.exists() and hub_repo is None:
        what = "something is there already"
        raise UserError(what, where=str(path), fix="remove it, or choose another place: --output")
    if isinstance(run.adapter, Full):
        model = pipeline.Trained.load(run, weights, runtime=runtime)
        if format == "single-file":
            single_file.write(model, path, precision=precision or "fp16", runtime=runtime)
        else:
            model.write(path, precision=precision or "fp16", runtime=runtime)
        return path
    parts = run.model.load({"denoiser", "text"}, dtype=runtime.dtype, device=runtime.device)
    adapter = sampling.attached(run, weights, parts)
    trained = _adapted(run, parts, adapter)
    del parts, adapter  # a second copy of the base model is loaded next
    runtime.release()
    if isinstance(trained, embedding.Trained):
        trained.write(path, precision=precision or "fp32", runtime=runtime)
        return path
    if format == "merged" or format == "single-file":
        assert isinstance(trained, lora.Trained)
        merged.write(trained, path, format=format, precision=precision or "fp16", runtime=runtime)
        return path
    trained.write(path, format=format, runtime=runtime, precision=precision or "fp16")
    if hub_repo is not None:
        hub.publish(path, run, about=About.of(run), repo=hub_repo)
    return path


def _default_place(run: RunConfig, checkpoint: Path, format: str) -> Path:
    """Where an export goes that is told nothing else."""
    whole = isinstance(run.adapter, Full)
    if isinstance(run.adapter, Embedding):
        end = "-embeddings"
    elif format in ("merged", "single-file") or whole:
        end = ("" if whole else "-merged") + (".safetensors" if format == "single-file" else "")
    else:
        end = f"-{format}.safetensors"
    return checkpoint.parent / f"{run.name}-{checkpoint.name}{end}"


def _refuse_push(run: RunConfig, format: str, hub_repo: str | None) -> None:
    if hub_repo is None or isinstance(run.adapter, Full | Embedding):
        return
    if run.tokens:
        raise UserError(
            "a card does not tell of new words so far",
            where="--push-to-hub",
            fix=f"export without it, then: hf upload {hub_repo} FOLDER",
        )
    if format in ("merged", "single-file") or not isinstance(run.adapter, LoRA):
        what = "only LoRA files are pushed with a card so far"
        raise UserError(what, where="--push-to-hub", fix=f"export without it, then: hf upload {hub_repo} FILE")


def _refuse_lora_options(format: str, hub_repo: str | None, trained: str) -> None:
    if format not in ("diffusers", "single-file"):
        raise UserError(
            f"{format} is a format of LoRA files, and this run trained {trained}",
            where="--format",
            fix="leave it out: a folder is written" + "; or write single-file" * ("model" in trained),
        )
    if hub_repo is not None:
        raise UserError(
            "only LoRA files are pushed with a card so far",
            where="--push-to-hub",
            fix=f"export the folder, then: hf upload {hub_repo} FOLDER",
        )


# Where a run starts, and what it leaves behind.


def _starting_point(store: saving.Store, resume: str | None, emit: Emit) -> Snapshot | None:
    if resume is None:
        if existing := checkpoints.listed(store.folder):
            raise UserError(
                f"this folder already holds a run (checkpoint-{max(existing)})",
                where=str(store.folder),
                fix="go on with it: --resume latest; or start another: --output OTHER_FOLDER",
            )
        return None
    named = Path(resume).expanduser()
    if resume != "latest" and not (named / "run.yaml").is_file():
        start = saving.load(named)
        if later := [step for step in checkpoints.listed(store.folder) if step > start.step]:
            raise UserError(
                f"this folder goes on after {named.name}, to checkpoint-{max(later)}",
                where=str(store.folder),
                fix="branch off into another folder with --output, or go on from the end with --resume latest",
            )
        return start
    path, refused = checkpoints.newest(store.folder if resume == "latest" else named)
    for bad, problems in refused.items():
        emit(Warned(0, f"{bad.name} is damaged and is passed over: {'; '.join(problems)}"))
    if path is not None:
        return saving.load(path)
    if refused:
        raise UserError(
            "no checkpoint of this run is whole",
            where=str(store.folder),
            fix="start again in another folder with --output; the damaged ones are kept",
        )
    emit(Warned(0, "there is no checkpoint yet: starting at step 0"))
    return None


def _check_identity(start: Snapshot, now: Mapping[str, Any], accept: Collection[str], tell: Emit) -> None:
    found = continuity.changes(start.position["identity"], now)
    continuity.refuse(found, accept)
    for change in found:
        tell(Warned(start.step, f"changed since the checkpoint: {change}"))


def _record(run: RunConfig, folder: RunFolder, identity: Mapping[str, Any]) -> None:
    write_atomic(folder.config, files.dump(run).encode())
    write_json(folder.lock_file, provenance() | {"identity": dict(identity)})
