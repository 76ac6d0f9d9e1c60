"""What each option costs: CPU seconds of a training step, as a ratio to plain LoRA, all in one run.

    python benchmarks/options.py                    # writes results/options.json; 10 to 20 minutes
    python benchmarks/options.py --only dora --rounds 2

Every option trains the same SDXL-shaped model (`model.py`) in this process: they take turns, a step each, so that a
busy moment of the machine hits all alike; the figure is the median over the rounds of the ratio to that round's plain
step. Latents and text embeddings are cached beforehand where the option allows that.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import model as models
import numpy as np
import torch
from PIL import Image

from gesso import stages
from gesso.config.run import RunConfig
from gesso.core.folder import RunFolder
from gesso.core.provenance import provenance
from gesso.core.runtime import Runtime
from gesso.training import loop
from gesso.training.session import Session

HERE = Path(__file__).parent
SIDE, PICTURES = 128, 8
LORA: dict[str, Any] = {"type": "lora", "rank": 16}
NEW = [{"token": "<new>", "initial": "man"}]
OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora, all linear layers": {"adapter": {**LORA, "targets": "all-linear"}},
    "lora, text encoders too": {"adapter": {**LORA, "train_text_encoders": True}},
    "lora, convolutions too": {"adapter": {**LORA, "targets": "all", "conv_rank": 8}},
    "lora, dropout": {"adapter": {**LORA, "dropout": 0.1}},
    "lora, rank dropout": {"adapter": {**LORA, "rank_dropout": 0.1}},
    "lora, module dropout": {"adapter": {**LORA, "module_dropout": 0.1}},
    "lora, max norm": {"adapter": {**LORA, "max_norm": 1.0}},
    "lora+": {"adapter": {**LORA, "lora_plus_ratio": 16}},
    "lora, new words": {"adapter": {**LORA, "tokens": NEW}},
    "dora": {"adapter": {**LORA, "dora": True}},
    "loha": {"adapter": {"type": "loha", "rank": 8}},
    "lokr": {"adapter": {"type": "lokr", "rank": 8}},
    "oft": {"adapter": {"type": "oft", "block_size": 16}},
    "full": {"adapter": {"type": "full"}},
    "full, updates inside the backward pass": {
        "adapter": {"type": "full"},
        "training": {"fused_backward": True, "clip": None},
    },
    "full, bf16": {"adapter": {"type": "full", "weights": "bf16"}, "training": {"precision": "bf16"}},
    "textual inversion": {"adapter": {"type": "embedding", "tokens": NEW}},
    "dreambooth, class images": {"objective": {"type": "dreambooth"}},
    "dreambooth, prior of the model": {
        "objective": {"type": "dreambooth", "prior": "model", "class_prompt": "a photo of a thing"}
    },
    "dpo": {"objective": {"type": "dpo"}},
    "ipo": {"objective": {"type": "dpo", "variant": "ipo"}},
    "identity loss": {"objective": {"identity": {"timestep_high": 1.0, "side": 64}}},
    "min-snr": {"objective": {"min_snr_gamma": 5}},
    "huber": {"objective": {"loss_type": "huber"}},
    "pyramid noise": {"objective": {"pyramid_noise_iterations": 6}},
    "offset noise": {"objective": {"noise_offset": 0.05}},
    "ema": {"training": {"ema": {"enabled": True}}},
    "gradient checkpointing": {"training": {"gradient_checkpointing": True}},
    "accumulation of 2": {"training": {"accumulation": 2}},
    "encoded at every visit": {"data": {"encoding": "live"}},
    "masks": {},
    "8-bit adamw": {"training": {"optimizer": {"type": "adamw8bit"}}},
    "adafactor": {"training": {"optimizer": {"type": "adafactor"}}},
    "schedule-free": {"training": {"optimizer": {"type": "schedule_free"}}},
    "d-adaptation": {"training": {"optimizer": {"type": "dadapt_adam"}}},
    "came": {"training": {"optimizer": {"type": "came"}}},
    "soap": {"training": {"optimizer": {"type": "soap"}}},
    "lion": {"training": {"optimizer": {"type": "lion"}}},
    "prodigy": {"training": {"optimizer": {"type": "prodigy"}}},
    "muon": {"training": {"optimizer": {"type": "muon"}}},
}


class Trainee(NamedTuple):
    """An option, ready to take steps."""

    run: RunConfig
    session: Session
    data: Any
    runtime: Runtime

    def step(self) -> float:
        """One optimiser step; its CPU seconds."""
        learner = self.session.learner
        target = learner.step + 1
        began = time.process_time()
        loop.fit(
            self.run.training,
            name=self.run.name,
            seed=self.run.seed,
            loss=partial(self.run.objective.loss, self.session.policy),
            learner=learner,
            stream=self.data.stream,
            runtime=self.runtime,
            actions=[],
            emit=stages.ignore,
            stopping=lambda: learner.step >= target,
        )
        return time.process_time() - began


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="tenth", choices=sorted(models.SIZES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", action="append", default=[], help="options whose names hold this; repeatable")
    args = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [name for name in OPTIONS if name == "lora" or not args.only or any(one in name for one in args.only)]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        pictures(folder)
        base = folder / "model"
        models.build_model(base, size=models.SIZES[args.size])
        trainees = {name: ready(name, base, folder) for name in chosen}
        seconds = measure(trainees, args.rounds)
    rows = {name: row(some, seconds["lora"]) for name, some in seconds.items()}
    for name, found in rows.items():
        print(f"{name:40} {found['seconds']:8.3f} s  {found['ratio']:6.2f}  ({found['from']:.2f} to {found['to']:.2f})")
    if not args.only:
        record = {
            "provenance": provenance(),
            "settings": {"size": args.size, "side": SIDE, "batch_size": 2, "rounds": args.rounds, "threads": 1},
            "cpu_seconds_a_step": rows,
        }
        (HERE / "results" / "options.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


def row(seconds: list[float], plain: list[float]) -> dict[str, float]:
    """The median step, and how many plain steps of its own round it takes: the median, and the middle half."""
    ratios = sorted(one / other for one, other in zip(seconds, plain, strict=True))
    edge = len(ratios) // 4
    return {
        "seconds": round(statistics.median(seconds), 4),
        "ratio": round(statistics.median(ratios), 3),
        "from": round(ratios[edge], 3),
        "to": round(ratios[-1 - edge], 3),
    }


def measure(trainees: dict[str, Trainee], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each option's steps, after two of each that are thrown away."""
    for trainee in trainees.values():
        for _ in range(2):
            trainee.step()
    seconds: dict[str, list[float]] = {name: [] for name in trainees}
    for _ in range(rounds):
        for name, trainee in trainees.items():
            seconds[name].append(trainee.step())
    return seconds


def ready(name: str, base: Path, folder: Path) -> Trainee:
    """An option's networks and data in memory."""
    values: dict[str, Any] = {
        "name": "option",
        "output": str(folder / "runs" / name.replace(" ", "-").replace(",", "")),
        "model": {"base": str(base)},
        "data": {
            "sources": [{"path": str(folder / "pictures")}],
            "resolution": SIDE,
            "cache": str(folder / "cache"),
            "workers": 0,
        },
        "adapter": LORA,
        "training": {"steps": 1000, "batch_size": 2, "precision": "fp32", "device": "cpu"},
        "trackers": [],
    }
    for section, content in OPTIONS[name].items():
        if section in ("data", "training"):
            values[section].update(content)
        else:
            values[section] = content
    if name in ("dpo", "ipo"):
        values["data"]["sources"][0]["path"] = str(folder / "pairs")
    elif name == "dreambooth, class images":
        values["data"]["sources"].append({"path": str(folder / "class"), "role": "prior"})
    elif name == "masks":
        values["data"]["sources"][0]["mask"] = "file"
    run = RunConfig.model_validate(values)
    place = RunFolder(run.folder)
    place.prepare()
    runtime = Runtime.detect(run.training.precision, "cpu")
    data = stages.prepare(run, place, runtime, stages.ignore)
    session = Session.build(run, data.parts, runtime)
    session.policy.train()
    return Trainee(run, session, data, runtime)


def pictures(folder: Path) -> None:
    """Captioned noise, class images and pairs of it."""
    rows = []
    for name in ("pictures", "class", "pairs"):
        (folder / name).mkdir()
    for i in range(3 * PICTURES):
        picture = Image.fromarray(np.random.default_rng(i).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8))
        name = ("pictures", "class", "pairs")[i % 3]
        picture.save(folder / name / f"{i}.png")
        if name == "pairs":
            picture.rotate(90).save(folder / name / f"{i}-other.png")
            rows.append({"caption": "a photo of a thing", "chosen": f"{i}.png", "rejected": f"{i}-other.png"})
        else:
            word = "<new> thing" if name == "pictures" else "thing"
            (folder / name / f"{i}.txt").write_text(f"a photo of a {word}", encoding="utf-8")
        if name == "pictures":
            picture.convert("L").save(folder / name / f"{i}-masklabel.png")
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "pairs" / "metadata.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
