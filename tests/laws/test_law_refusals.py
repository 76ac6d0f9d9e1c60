"""Methods, adapters and settings that make no sense together: each is refused, with the reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gesso.config import advice, files
from gesso.errors import Problems

TOKENS = "tokens: [{token: <new>, initial: thing}]"
BF16 = ("adapter={type: full, weights: bf16}", "training.precision=bf16")
MODEL = "objective={type: dreambooth, prior: model, class_prompt: a thing}"
PRIOR = "data.sources=[{path: pictures}, {path: class, role: prior}]"
MASKED = "data.sources=[{path: pictures, mask: file}]"
REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "new words with LoHa, LoKr, OFT or full weights": (
        (f"adapter={{type: lokr, {TOKENS}}}",),
        "only for type: lora or",
    ),
    "new words with DoRA": ((f"adapter={{type: lora, dora: true, {TOKENS}}}",), "read by no program"),
    "new words alone with text encoders": (
        (f"adapter={{type: embedding, {TOKENS}, train_text_encoders: true}}",),
        "only for type",
    ),
    "DoRA of LoHa": (("adapter={type: loha, dora: true}",), "only for type: lora"),
    "rsLoRA or LoRA+ of LoKr": (("adapter={type: lokr, lora_plus_ratio: 4}",), "only for type: lora"),
    "a rank for OFT": (("adapter={type: oft, rank: 4}",), "only for type: lora or loha or lokr"),
    "dropout in full weights": (("adapter={type: full, dropout: 0.1}",), "only for type: lora"),
    "max_norm with DoRA": (("adapter={type: lora, dora: true, max_norm: 1}",), "which trains the norms"),
    "rank_dropout with DoRA": (("adapter={type: lora, dora: true, rank_dropout: 0.1}",), "of other weights"),
    "bf16 weights with Muon, schedule-free, ...": (
        (*BF16, "training.optimizer={type: muon}"),
        "looks at whole tensors, and bf16 weights are updated piece by piece",
    ),
    "bf16 weights that compute in float32": ((BF16[0], "training.precision=fp32"), "also compute in bf16"),
    "preferences with masks": (("objective={type: dpo}", MASKED), "pairs of pictures have no masks"),
    "preferences with min-SNR, Huber or the identity loss": (
        ("objective={type: dpo, min_snr_gamma: 5}",),
        "only for type: denoise or dreambooth",
    ),
    "preferences with class images": (("objective={type: dpo}", PRIOR), "mean nothing to objective dpo"),
    "IPO with label smoothing": (
        ("objective={type: dpo, variant: ipo, label_smoothing: 0.1}",),
        "belongs to the sigmoid variant",
    ),
    "class images with the plain loss": ((PRIOR,), "mean nothing to objective denoise"),
    "class images beside the model as its own prior": ((MODEL, PRIOR), "takes no prior images"),
    "DreamBooth without a class": (("objective={type: dreambooth}",), "there are no prior images"),
    "zero-terminal SNR for a model that predicts noise": (("model.zero_terminal_snr=true",), "learns nothing from it"),
    "an average of what schedule-free averages": (
        ("training.optimizer={type: schedule_free}", "training.ema={enabled: true}"),
        "already averages",
    ),
    "rates of text encoders that do not train": (
        ("training.text_encoder_learning_rates=[1e-5]",),
        "the text encoders do not train",
    ),
    "a rate of new words without any": (("training.token_learning_rate=1e-3",), "no new words are trained"),
    "the best by a measure that the method does not have": (
        ("checkpoint.keep_best=accuracy", "data.validation.fraction=0.5"),
        "objective denoise does not measure accuracy",
    ),
    "the best checkpoint without held-out pictures": (
        ("checkpoint.keep_best=loss",),
        "no checkpoint is known to be the best",
    ),
}


@pytest.mark.parametrize("together", REFUSED)
def test_refused(tmp_path: Path, record_property: Callable[[str, Any], None], together: str) -> None:
    sets, reason = REFUSED[together]
    for folder in ("pictures", "class"):
        (tmp_path / folder).mkdir()
        for i in range(4):
            (tmp_path / folder / f"{i}.png").write_bytes(b"")
            (tmp_path / folder / f"{i}.txt").write_text("a <new> thing")
    text = "model: {base: micro:sdxl}\ndata: {resolution: 64, sources: [{path: pictures}]}\ntraining: {steps: 9}\n"
    with pytest.raises(Problems) as told:
        advice.check(files.load_text(text, folder=tmp_path, sets=sets).run).require()
    found = [problem.what for problem in told.value.problems if reason in problem.what]
    assert len(found) == 1, [problem.what for problem in told.value.problems]
    record_property("reason", found[0])
