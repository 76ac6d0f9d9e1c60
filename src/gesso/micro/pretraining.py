"""Training single networks on painted pictures, from random weights, with the ordinary loop and checkpoints.

The denoiser and its text encoders need nothing from here: they are an ordinary run with `adapter: {type: full}`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from gesso.config.run import Checkpoint, Training
from gesso.core import checkpoints
from gesso.core.batch import Batch
from gesso.core.events import Finished, RunStarted, Saved, Warned
from gesso.core.folder import RunFolder
from gesso.core.random import Draws, SampleKey, generator
from gesso.core.runtime import Runtime
from gesso.core.seams import Emit, Layout
from gesso.core.signals import stop_requests
from gesso.errors import Interrupted
from gesso.trackers import RunLog
from gesso.training import checkpoint, loop, optim
from gesso.training.checkpoint import Snapshot
from gesso.training.ema import Average
from gesso.training.loop import Action, Learner

_SAVE_EVERY = 250

Loss = Callable[[Any, Batch], Tensor]
"""What a network is trained for: (network, batch) -> the loss of each sample, [B]."""


@dataclass(frozen=True)
class Pictures:
    """Random batches of pictures in memory, a `core.seams.Stream`; step i is a function of (seed, i) alone.

    pixels    [N, 3, H, W] uint8; a batch's `latents` are rows of it in [-1, 1]
    captions  N texts, or N names of what is to be told apart
    crop      the side of a random square crop at a step, or None for whole pictures
    """

    pixels: Tensor
    captions: Sequence[str]
    batch_size: int
    seed: int
    crop: Callable[[int], int | None] = lambda _: None

    @property
    def steps_per_epoch(self) -> int:
        """Steps that see as many pictures as there are."""
        return len(self.captions) // self.batch_size

    def window_size(self, step: int) -> int:
        """Samples in a step."""
        del step
        return self.batch_size

    def window(self, step: int) -> Iterator[Batch]:
        """The one batch of a step."""
        draw = generator(self.seed, "pictures", step)
        rows = draw.integers(len(self.captions), size=self.batch_size)
        pixels, side = self.pixels[torch.from_numpy(rows)], self.crop(step)
        if side is not None:
            top, left = (4 * int(v) for v in draw.integers((pixels.shape[-1] - side) // 4 + 1, size=2))
            pixels = pixels[..., top : top + side, left : left + side]
        yield Batch(
            latents=scaled(pixels),
            noise=torch.zeros(0),
            u=torch.from_numpy(draw.random(self.batch_size, np.float32)),
            weights=torch.ones(self.batch_size),
            geometry=(),
            captions=tuple(self.captions[row] for row in rows),
            text=None,
            files=tuple(f"picture {row}" for row in rows),
            draws=Draws(self.seed, step, tuple(SampleKey(str(row), i) for i, row in enumerate(rows))),
        )


def pixels(pictures: Sequence[Image.Image]) -> Tensor:
    """Pictures of one size as [N, 3, H, W] uint8."""
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2).contiguous()


def scaled(values: Tensor) -> Tensor:
    """uint8 pixels in [-1, 1], float32."""
    return values.float() / 127.5 - 1


def autoencoding(vae: Any, batch: Batch, *, divergence: float = 2e-4) -> Tensor:
    """Squared and absolute error, and a weak KL term that keeps latents smooth enough to be denoised."""
    posterior = vae.encode(batch.latents).latent_dist
    noise = torch.from_numpy(batch.draws.normal("posterior", posterior.mean.shape[1:])).to(batch.latents)
    error = (vae.decode(posterior.mean + posterior.std * noise).sample - batch.latents).flatten(1)
    kl = (posterior.mean.square() + posterior.var - 1 - posterior.logvar).flatten(1)
    return error.square().mean(1) + 0.5 * error.abs().mean(1) + divergence * kl.mean(1)


def contrasting(tokenize: Callable[[Sequence[str]], Tensor], clip: Any, batch: Batch) -> Tensor:
    """CLIP's loss (Radford et al. 2021), both ways; pictures with the same caption are all right answers."""
    output = clip(input_ids=tokenize(batch.captions).to(batch.latents.device), pixel_values=batch.latents)
    same = _same(batch)
    target = (same / same.sum(1, keepdim=True)).to(batch.latents)
    logits = output.logits_per_image
    return 0.5 * (
        F.cross_entropy(logits, target, reduction="none") + F.cross_entropy(logits.T, target, reduction="none")
    )


def telling_apart(encoder: Any, batch: Batch, *, temperature: float = 0.1) -> Tensor:
    """Supervised contrast (Khosla et al. 2020, arXiv:2004.11362): embeddings of one character lie close together."""
    embeddings = F.normalize(encoder(pixel_values=batch.latents).image_embeds, dim=1)
    itself = torch.eye(len(batch), dtype=torch.bool, device=embeddings.device)
    alike = _same(batch).bool().to(embeddings.device) & ~itself
    log_share = (embeddings @ embeddings.T / temperature).masked_fill(itself, -1e9).log_softmax(1)
    return -(log_share * alike).sum(1) / alike.sum(1).clamp(min=1)


def _same(batch: Batch) -> Tensor:
    """1 where two samples of a batch have the same caption, [B, B]."""
    numbers = {text: i for i, text in enumerate(dict.fromkeys(batch.captions))}
    which = torch.tensor([numbers[text] for text in batch.captions])
    return (which[:, None] == which[None]).float()


def pretrain(
    name: str,
    network: nn.Module,
    *,
    loss: Loss,
    stream: Pictures,
    training: Training,
    seed: int,
    folder: Path,
    emit: Emit,
) -> nn.Module:
    """Train all of a network, going on from the newest checkpoint in `folder`, and put the average into it.

    The folder is a run folder. Raises `Interrupted`, with everything saved, after SIGTERM or Ctrl-C.
    """
    runtime = Runtime.detect(training.precision, training.device)
    network.requires_grad_(True).train().to(runtime.device)
    place = RunFolder(folder.absolute())
    place.prepare()
    with place.held(), stop_requests() as stopping:
        learning = _Learning.of(name, network, training, runtime)
        store = checkpoint.Store(
            place.path, Checkpoint(every=250, keep_last=1), warn=lambda text: emit(Warned(0, text))
        )
        store.sweep()
        path, _ = checkpoints.newest(place.path)
        if path is not None:
            learning.restore(checkpoint.load(path))
        learner, total = learning.learner, training.total_steps(stream.steps_per_epoch)
        with RunLog(place, (), name=name, started_at=learner.step, stopping=stopping, emit=emit) as tell:

            def save(step: int) -> None:
                tell(Saved(step, str(store.save(learning.snapshot())), 0.0))

            tell(RunStarted(learner.step, total, len(stream.captions), str(place.path)))
            loop.fit(
                training,
                name=name,
                seed=seed,
                loss=partial(loss, network),
                learner=learner,
                stream=stream,
                runtime=runtime,
                actions=[Action(_SAVE_EVERY, save)],
                emit=tell,
                stopping=stopping,
            )
            if learner.step < total:
                save(learner.step)
                raise Interrupted(f"stopped after step {learner.step}; everything is saved", where=str(folder))
            tell(Finished(learner.step, 0.0, runtime.peak_memory(), {}))
    learning.average_into_network()
    return network.eval().requires_grad_(False).cpu()


@dataclass
class _Learning:
    """One network with its optimiser and average, and how they are saved."""

    name: str
    network: nn.Module
    learner: Learner

    @classmethod
    def of(cls, name: str, network: nn.Module, training: Training, runtime: Runtime) -> _Learning:
        parameters = dict(network.named_parameters())
        group = optim.flat_group(training.optimizer, name, parameters, learning_rate=training.learning_rate)
        learner = Learner(
            groups=[group],
            optimizer=optim.build(training.optimizer, [group]),
            average=Average(training.ema, [group]),
            scaler=runtime.scaler(),
            after_step=lambda: None,
        )
        return cls(name, network, learner)

    def snapshot(self) -> Snapshot:
        average = self.learner.average
        assert average is not None
        weights = {k: p.detach() for k, p in self.network.named_parameters()}
        return Snapshot(
            step=self.learner.step,
            weights={f"{self.name}.{k}": p for k, p in weights.items()},
            layout=Layout({f"{self.name}/model.safetensors": {"format": "pt"}}),
            optimizer=optim.state(self.learner.optimizer),
            average={f"{self.name}.{k}": v for k, v in average.state().items()},
            position={},
        )

    def restore(self, saved: Snapshot) -> None:
        average, start = self.learner.average, f"{self.name}."
        assert average is not None
        assert saved.average is not None
        with torch.no_grad():
            for key, parameter in self.network.named_parameters():
                parameter.copy_(saved.weights[start + key])
        optim.restore(self.learner.optimizer, saved.optimizer)
        average.restore({k.removeprefix(start): v for k, v in saved.average.items()})
        self.learner.step = saved.step

    @torch.no_grad()
    def average_into_network(self) -> None:
        assert self.learner.average is not None
        averaged = self.learner.average.state()
        for key, parameter in self.network.named_parameters():
            parameter.copy_(averaged[key])
