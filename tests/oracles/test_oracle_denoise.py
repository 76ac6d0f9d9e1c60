"""The denoising objective from outside: what the network is fed, what it is asked for, what it costs."""

from __future__ import annotations

import formulas
import numpy as np
import pytest
import torch
from rig import PREDICTIONS, FunctionPolicy, ddpm, make_batch, normal, rows
from torch import Tensor, nn

from gesso.core.random import Draws, SampleKey
from gesso.objectives import Denoise

ABAR = formulas.SDXL_ALPHA_BAR


def zero_answer(noisy: Tensor, _t: Tensor) -> Tensor:
    return torch.zeros_like(noisy)


def recover_target(objective: Denoise, policy_noise: object, batch: object) -> tuple[Tensor, Tensor]:
    """(noisy, target) of an l2 objective: the gradient of mean((p - target)^2) at p = 0 is -2 target / n."""
    kept: list[Tensor] = []

    def network(noisy: Tensor, _t: Tensor) -> Tensor:
        kept.append(torch.zeros_like(noisy, requires_grad=True))
        return kept[0]

    policy = FunctionPolicy(policy_noise, network)
    objective.loss(policy, batch).sum().backward()
    grad = kept[0].grad
    assert grad is not None
    return policy.noisy, -grad * grad[0].numel() / 2


# --------------------------------------------------------------------------- value


@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("kind", ["l2", "l1", "huber"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_loss_value(prediction: str, kind: str, gamma: float | None) -> None:
    """Every timestep once, weights of its own, against the float64 formula."""
    latents, noise, answer = (normal(seed, 1000, 4, 3, 5) for seed in (1, 2, 3))
    weights = np.random.default_rng(4).uniform(0.1, 3, 1000).astype(np.float32)
    batch = make_batch(latents, noise, (np.arange(1000) + 0.5) / 1000, weights=weights)
    t = np.arange(1000)
    policy = FunctionPolicy(ddpm(prediction), lambda _noisy, _t: torch.from_numpy(answer))
    found = Denoise(loss_type=kind, huber_delta=0.3, min_snr_gamma=gamma).loss(policy, batch)
    assert found.shape == (1000,)
    assert found.dtype == torch.float32
    truth = formulas.target(ABAR, latents, noise, t, prediction)
    wanted = formulas.per_sample("pseudo_huber" if kind == "huber" else kind, answer, truth, delta=0.3) * weights
    if gamma is not None:
        wanted *= formulas.min_snr_weight(ABAR, gamma, prediction)
    assert formulas.relative(found.double().numpy(), wanted) < 1e-6
    assert np.abs(policy.noisy.double().numpy() - formulas.corrupt(ABAR, latents, noise, t)).max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_answers_cost_float32_losses(dtype: torch.dtype) -> None:
    """A bf16 network answers in bf16; difference, square and mean are float32."""
    latents, noise = normal(5, 64, 4, 8, 8), normal(6, 64, 4, 8, 8)
    answer = torch.from_numpy(noise + 0.05 * normal(7, 64, 4, 8, 8)).to(dtype)
    batch = make_batch(latents, noise, (np.arange(64) + 0.5) / 64, dtype=torch.float32)
    found = Denoise().loss(FunctionPolicy(ddpm(), lambda _noisy, _t: answer), batch)
    wanted = formulas.per_sample("l2", answer.double().numpy(), noise)
    assert formulas.relative(found.double().numpy(), wanted) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_latents_are_corrupted_in_float32(dtype: torch.dtype) -> None:
    batch = make_batch(normal(8, 1000, 4, 2, 2), normal(9, 1000, 4, 2, 2), (np.arange(1000) + 0.5) / 1000, dtype=dtype)
    noisy, target = recover_target(Denoise(), ddpm("v_prediction"), batch)
    exact = batch.latents.double().numpy(), batch.noise.double().numpy(), np.arange(1000)
    assert noisy.dtype == torch.float32
    assert np.abs(noisy.double().numpy() - formulas.corrupt(ABAR, *exact)).max() < 1e-6
    assert np.abs(target.double().numpy() - formulas.target(ABAR, *exact, "v_prediction")).max() < 1e-6


def test_huber_is_quadratic_near_zero_and_linear_far_away() -> None:
    delta = 0.1
    noise = normal(10, 2, 1, 1, 1)
    batch = make_batch(np.zeros_like(noise), noise, np.array([0.3, 0.3]))
    step = torch.tensor([1e-3, 50.0]).view(2, 1, 1, 1)
    policy = FunctionPolicy(ddpm(), lambda _noisy, _t: torch.from_numpy(noise) + step)
    near, far = Denoise(loss_type="huber", huber_delta=delta).loss(policy, batch).tolist()
    assert near == pytest.approx(1e-6, rel=0.02)  # d^2, float32 cancellation included
    assert far == pytest.approx(2 * delta * 50, rel=0.01)


# --------------------------------------------------------------------------- noise


def plain_batch(count: int, side: int) -> object:
    draws = Draws(3, 0, tuple(SampleKey(f"image-{i}") for i in range(count)))
    noise = draws.normal("noise", (4, side, side))
    return make_batch(np.zeros_like(noise), noise, np.full(count, 0.5), seed=3)


@pytest.mark.parametrize("k", [0.0, 0.05, 0.3])
def test_noise_offset_variance(k: float) -> None:
    """Variance of the mean of a channel = 1/(HW) + k^2: 4096 draws of 4 channels, 5 sigma."""
    side = 8
    _, target = recover_target(Denoise(noise_offset=k), ddpm(), plain_batch(4096, side))
    means = target.double().mean(dim=(2, 3)).numpy()
    wanted = formulas.channel_mean_variance(side, side, k)
    sigma = wanted * np.sqrt(2 / means.size)
    assert abs(means.var() - wanted) < 5 * sigma
    assert abs(means.mean()) < 5 * np.sqrt(wanted / means.size)
    # One number per (sample, channel): channels of one sample know nothing of each other.
    correlation = np.corrcoef(means.T)[np.triu_indices(4, 1)]
    assert np.abs(correlation).max() < 5 / np.sqrt(len(means))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_noise_offset_is_in_the_input_and_in_the_target(prediction: str) -> None:
    """From noisy and target alone: with a x_t - s v = x0 (or target = n) the offset noise is one and the same."""
    latents, noise = normal(11, 50, 4, 6, 6), normal(12, 50, 4, 6, 6)
    t = np.arange(0, 1000, 20)
    batch = make_batch(latents, noise, (t + 0.5) / 1000)
    noisy, target = recover_target(Denoise(noise_offset=0.2), ddpm(prediction), batch)
    a, s = formulas.coefficients(ABAR, t, 4)
    mixed = (noisy.double().numpy() - a * latents) / s
    assert np.abs(formulas.target(ABAR, latents, mixed, t, prediction) - target.double().numpy()).max() < 2e-5
    offset = mixed - noise
    constant = offset.mean(axis=(2, 3), keepdims=True)
    assert np.abs(offset - constant).max() < 3e-5
    assert 0.15 < constant.std() < 0.25
    redone = formulas.offset_noise(noise, constant[:, :, 0, 0] / 0.2, 0.2)
    assert np.abs(noisy.double().numpy() - formulas.corrupt(ABAR, latents, redone, t)).max() < 1e-5


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_input_perturbation_is_in_the_input_only(prediction: str) -> None:
    latents, noise = normal(13, 50, 4, 16, 16), normal(14, 50, 4, 16, 16)
    t = np.arange(0, 1000, 20)
    batch = make_batch(latents, noise, (t + 0.5) / 1000)
    noisy, target = recover_target(Denoise(input_perturbation=0.1), ddpm(prediction), batch)
    assert np.abs(target.double().numpy() - formulas.target(ABAR, latents, noise, t, prediction)).max() < 2e-6
    a, s = formulas.coefficients(ABAR, t, 4)
    extra = (noisy.double().numpy() - a * latents) / s - noise
    assert extra.std() == pytest.approx(0.1, rel=5 / np.sqrt(2 * extra.size))
    assert abs(np.corrcoef(extra.ravel(), noise.ravel())[0, 1]) < 5 / np.sqrt(extra.size)
    assert abs(np.corrcoef(extra.ravel(), latents.ravel())[0, 1]) < 5 / np.sqrt(extra.size)


def test_offset_and_perturbation_are_different_numbers() -> None:
    batch = plain_batch(500, 1)  # one cell: an offset and a perturbation then have the same shape
    noisy, target = recover_target(Denoise(noise_offset=1.0, input_perturbation=1.0), ddpm(), batch)
    sigma = float(np.sqrt(1 - ABAR[500]))
    extra, offset = (noisy / sigma - target).flatten().numpy(), (target - batch.noise).flatten().numpy()
    assert abs(np.corrcoef(extra, offset)[0, 1]) < 5 / np.sqrt(extra.size)
    assert abs(np.corrcoef(extra, batch.noise.flatten().numpy())[0, 1]) < 5 / np.sqrt(extra.size)


# --------------------------------------------------------------------------- timesteps


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (0.2, 0.7), (0.0, 0.001), (0.999, 1.0), (0.5, 0.502), (0.0, 0.4), (0.333, 1.0)]
)
def test_timestep_range_is_kept_and_its_ends_are_reached(low: float, high: float) -> None:
    edge = np.array([0.0, 5e-324, 1e-9, 0.5, 1 - 2.0**-53])
    u = np.concatenate([edge, np.random.default_rng(1).random(20_000)])
    batch = make_batch(np.zeros((len(u), 1, 1, 1)), np.zeros((len(u), 1, 1, 1)), u)
    policy = FunctionPolicy(ddpm(), zero_answer)
    Denoise(timestep_low=low, timestep_high=high).loss(policy, batch)
    first, last = round(low * 1000), round(high * 1000) - 1
    assert policy.t.dtype == torch.int64
    assert int(policy.t.min()) == int(policy.t[0]) == int(policy.t[1]) == first
    assert int(policy.t.max()) == int(policy.t[4]) == last
    wanted = np.minimum(first + np.floor(u * (last + 1 - first)), last)
    assert np.array_equal(policy.t.numpy(), wanted)


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.0004), (0.5, 0.5003), (0.4996, 0.4999), (0.9997, 1.0)])
def test_a_range_shorter_than_a_timestep_stays_where_it_was_asked_for(low: float, high: float) -> None:
    """An accepted range holds at least one timestep: never -1, which would mean the noisiest one."""
    t = ddpm().sample_t(torch.linspace(0, 1, 50, dtype=torch.float64)[:-1], low=low, high=high)
    assert int(t.min()) >= max(0, int(np.floor(low * 1000)))
    assert int(t.max()) <= min(999, int(np.ceil(high * 1000)))


def test_timesteps_are_uniform() -> None:
    draws = Draws(11, 0, tuple(SampleKey(f"image-{i}") for i in range(60_000)))
    t = ddpm().sample_t(torch.from_numpy(draws.uniform("timestep")), low=0.0, high=1.0).numpy()
    assert abs(formulas.chi_square(np.bincount(t, minlength=1000))) < 5
    fine = ddpm().sample_t(torch.from_numpy((np.arange(70_000) + 0.5) / 70_000), low=0.3, high=1.0).numpy()
    assert (np.bincount(fine, minlength=1000)[300:] == 100).all()


# --------------------------------------------------------------------------- batches


class SmallNet(nn.Module):
    """A convolution that also sees the timestep; works in the dtype of its weights."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.one = nn.Parameter(torch.randn(8, 4, 3, 3, generator=generator, dtype=torch.float64).to(dtype) * 0.2)
        self.two = nn.Parameter(torch.randn(4, 8, 3, 3, generator=generator, dtype=torch.float64).to(dtype) * 0.2)
        self.time = nn.Parameter(torch.randn(8, generator=generator, dtype=torch.float64).to(dtype))

    def forward(self, noisy: Tensor, t: Tensor) -> Tensor:
        hidden = nn.functional.conv2d(noisy.to(self.one.dtype), self.one, padding=1)
        hidden = hidden + self.time[:, None, None] * (t.to(self.one.dtype) / 1000)[:, None, None, None]
        return nn.functional.conv2d(torch.tanh(hidden), self.two, padding=1)


def split_batch() -> object:
    draws = np.random.default_rng(30)
    return make_batch(
        normal(31, 12, 4, 8, 8),
        normal(32, 12, 4, 8, 8),
        draws.random(12),
        weights=draws.uniform(0.2, 2, 12).astype(np.float32),
    )


FULL = Denoise(noise_offset=0.1, input_perturbation=0.1, min_snr_gamma=5.0, loss_type="huber")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_gradient_does_not_depend_on_the_batch_split(dtype: torch.dtype, tolerance: float) -> None:
    batch = split_batch()

    def gradient(parts: list[list[int]]) -> np.ndarray:
        network = SmallNet(dtype)
        for part in parts:
            policy = FunctionPolicy(ddpm(), network)
            (FULL.loss(policy, rows(batch, part)).to(dtype).sum() / 12).backward()
        return np.concatenate([p.grad.double().numpy().ravel() for p in network.parameters()])

    whole = gradient([list(range(12))])
    assert np.linalg.norm(whole) > 1e-3
    splits = [
        [[i] for i in range(12)],
        [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]],
        [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11]],
        [[7], [3, 0, 11, 5], [1, 2, 4, 6, 8, 9, 10]],
    ]
    for split in splits:
        assert formulas.relative_l2(gradient(split), whole) <= tolerance


def test_loss_of_a_sample_does_not_depend_on_its_batch_mates() -> None:
    """Bit for bit where the network treats samples alike, and so the draws, timestep and weight are its own."""
    batch = split_batch()

    def losses(part: list[int]) -> Tensor:
        policy = FunctionPolicy(ddpm(), lambda noisy, t: noisy * 0.9 - 0.1 * (t / 1000).float()[:, None, None, None])
        return FULL.loss(policy, rows(batch, part))

    whole = losses(list(range(12)))
    assert whole.unique().numel() == 12
    for part in ([4], [4, 0], [11, 10, 4, 3, 2]):
        assert torch.equal(losses(part), whole[part])


def test_weights_scale_each_sample_alone() -> None:
    batch = split_batch()
    alone = make_batch(batch.latents.numpy(), batch.noise.numpy(), batch.u.numpy())
    policy = FunctionPolicy(ddpm(), zero_answer)
    weighted, plain = FULL.loss(policy, batch), FULL.loss(policy, alone)
    assert torch.equal(weighted, plain * batch.weights)


def test_gradient_against_finite_differences() -> None:
    """The derivative of the summed loss along a random direction, by central differences in a float64 network."""
    batch = rows(split_batch(), [0, 3, 7])
    objective = Denoise(min_snr_gamma=5.0, noise_offset=0.1)
    network = SmallNet(torch.float64)
    direction = [torch.from_numpy(normal(40 + i, *p.shape)).double() for i, p in enumerate(network.parameters())]

    def loss() -> Tensor:
        return objective.loss(FunctionPolicy(ddpm("v_prediction"), network), batch).double().sum()

    loss().backward()
    slope = sum(float((p.grad * d).sum()) for p, d in zip(network.parameters(), direction, strict=True))

    def moved(amount: float) -> float:
        with torch.no_grad():
            for p, d in zip(network.parameters(), direction, strict=True):
                p += amount * d
            value = float(loss())
            for p, d in zip(network.parameters(), direction, strict=True):
                p -= amount * d
        return value

    step = 3e-3  # the loss itself is float32, so the step cannot be tiny
    wanted = (8 * (moved(step) - moved(-step)) - (moved(2 * step) - moved(-2 * step))) / (12 * step)
    assert slope == pytest.approx(wanted, rel=1e-3)
