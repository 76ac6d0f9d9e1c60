"""The identity loss: its value, where it acts, and that gradients reach what trains through decoder and recogniser."""

from __future__ import annotations

import dataclasses
import math
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gesso import stages
from gesso.core import recognition
from gesso.core.folder import RunFolder
from gesso.core.runtime import Runtime
from gesso.errors import ResourceError
from gesso.objectives import Denoise
from gesso.objectives.identity import IdentityLoss
from gesso.training.session import Session
from run_helpers import MakeRun

CPU = torch.device("cpu")


@pytest.fixture
def live(make_run: MakeRun) -> tuple[Any, Session, Any]:
    run = make_run(
        "run", objective={"identity": {}}, data__captions={}, training__batch_size=4, training__accumulation=1
    )
    folder = RunFolder(run.folder)
    folder.prepare()
    runtime = Runtime.detect("fp32", "cpu")
    data = stages.prepare(run, folder, runtime, lambda event: None)
    batch = next(b for step in range(3) for b in data.stream.window(step) if len(b) == 4)
    return run, Session.build(run, data.parts, runtime), batch


def test_the_value_by_hand_and_only_where_there_is_little_noise(live: tuple[Any, Session, Any]) -> None:
    run, session, batch = live
    policy = session.policy
    batch = dataclasses.replace(batch, u=torch.tensor([0.1, 0.2, 0.3, 0.9]))
    plain = Denoise().loss(policy, batch)
    extra = (run.objective.loss(policy, batch) - plain).detach()
    assert extra[2:].tolist() == [0, 0]
    t = torch.tensor([100, 200, 300, 900])
    noisy = policy.noise.corrupt(batch.latents, batch.noise, t)
    clean = policy.noise.clean(noisy, policy.predict(noisy, t, policy.condition(batch)), t).detach()
    recogniser = recognition.load("micro:identity", CPU)
    for i in range(2):
        shown, true = (recogniser.embed(policy.decode(x[i : i + 1])).double() for x in (clean, batch.latents))
        cosine = float((shown * true).sum() / (shown.norm() * true.norm()))
        assert float(extra[i]) == pytest.approx(0.1 * (1 - cosine), rel=1e-3, abs=1e-6)
        assert extra[i] > 1e-4


def test_gradients_reach_the_trained_weights_and_nothing_else_moves(live: tuple[Any, Session, Any]) -> None:
    run, session, batch = live
    batch = dataclasses.replace(batch, u=torch.full((4,), 0.1))
    decoder = {name: p.clone() for name, p in session.parts.vae.named_parameters()}

    def gradient(objective: Any) -> Tensor:
        for group in session.learner.groups:
            group.gradient.zero_()
        objective.loss(session.policy, batch).sum().backward()
        return session.learner.groups[0].gradient.clone()

    difference = gradient(run.objective) - gradient(Denoise())
    assert difference.norm() > 1e-6
    assert all(p.grad is None for p in session.parts.vae.parameters())
    assert all(torch.equal(p, decoder[name]) for name, p in session.parts.vae.named_parameters())


def test_a_run_trains_with_it_and_it_changes_the_weights(make_run: MakeRun) -> None:
    from safetensors.torch import load_file

    folders = [
        stages.train(make_run(name, training__steps=2, objective=objective))
        for name, objective in (("with", {"identity": {"timestep_high": 1.0}}), ("without", {}))
    ]
    one, other = (load_file(f / "checkpoint-2" / "pytorch_lora_weights.safetensors") for f in folders)
    assert any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("cells", "side", "expected"), [((16, 16), 256, (16, 16)), ((128, 64), 256, (32, 16))])
def test_large_pictures_are_decoded_small(cells: tuple[int, int], side: int, expected: tuple[int, int]) -> None:
    assert IdentityLoss(side=side)._small(torch.zeros(1, 4, *cells)).shape[-2:] == expected


def test_the_packaged_recogniser_is_the_metric_and_differentiable() -> None:
    from PIL import Image

    from gesso.metrics import Identity

    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    tensor = (torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1).requires_grad_()
    embedded = recognition.load("micro:identity", CPU).embed(tensor)
    assert torch.allclose(embedded, Identity().embeddings([Image.fromarray(pixels)]), atol=1e-5)
    embedded[0, 0].backward()
    assert tensor.grad is not None
    assert tensor.grad.abs().sum() > 0


def test_without_a_differentiable_model_the_run_is_refused_before_it_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = recognition.problem("buffalo_l")
    assert isinstance(found, ResourceError)
    assert "insightface and onnx2torch" in str(found)
    for name in ("insightface", "onnx2torch"):
        module = types.ModuleType(name)
        module.__spec__ = types.SimpleNamespace(name=name)  # type: ignore[assignment]
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(recognition, "_INSIGHTFACE", tmp_path)
    assert "does not exist" in str(recognition.problem("buffalo_l"))


def test_faces_are_brought_upright(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A face that was turned, enlarged and moved comes to lie where ArcFace wants it; its detector is a stand-in."""
    angle, scale, shift = math.radians(25), 1.7, np.array([90.0, 40.0])
    turn = scale * np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    marks = np.array(recognition._ARCFACE_MARKS) @ turn.T + shift
    rows, columns = np.mgrid[0:300, 0:400]
    picture = sum(np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / 18) for x, y in marks)

    class FaceAnalysis:
        def __init__(self, name: str, allowed_modules: list[str]) -> None:
            assert (name, allowed_modules) == ("buffalo_l", ["detection"])

        def prepare(self, ctx_id: int) -> None:
            del ctx_id

        def get(self, seen: Any) -> list[Any]:
            if seen.max() < 200:
                return []
            box = np.array([marks[:, 0].min(), marks[:, 1].min(), marks[:, 0].max(), marks[:, 1].max()])
            small = types.SimpleNamespace(bbox=np.array([0, 0, 9, 9]), kps=np.zeros((5, 2)))
            return [small, types.SimpleNamespace(bbox=box, kps=marks)]

    for name, content in (
        ("insightface", {}),
        ("insightface.app", {"FaceAnalysis": FaceAnalysis}),
        ("onnx2torch", {"convert": lambda path: torch.nn.Flatten()}),
    ):
        module = types.ModuleType(name)
        module.__spec__ = types.SimpleNamespace(name=name)  # type: ignore[assignment]
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    (tmp_path / "buffalo_l").mkdir()
    (tmp_path / "buffalo_l" / "w600k_r50.onnx").touch()
    monkeypatch.setattr(recognition, "_INSIGHTFACE", tmp_path)
    recogniser = recognition.load.__wrapped__("buffalo_l", CPU)
    pixels = torch.from_numpy(picture).float().clamp(0, 1).mul(2).sub(1).expand(1, 3, 300, 400)
    cut = recogniser.find(pixels)
    assert cut is not None
    face = (cut(pixels)[0, 0] + 1) / 2
    for x, y in recognition._ARCFACE_MARKS:
        around = face[round(y) - 3 : round(y) + 4, round(x) - 3 : round(x) + 4]
        centre = torch.stack(torch.meshgrid(torch.arange(7.0), torch.arange(7.0), indexing="ij"))
        found = (centre * around).flatten(1).sum(1) / around.sum()
        assert torch.allclose(found - 3, torch.tensor([y - round(y), x - round(x)], dtype=torch.float32), atol=0.3)
    assert recogniser.embed(cut(pixels)).norm() == pytest.approx(1, rel=1e-4)
    assert recogniser.find(torch.full((1, 3, 64, 64), -1.0)) is None
