"""The check of the checks: seeds one fault at a time into a copy of the package, and runs tests that should notice.

    python benchmarks/quality/mutations.py              # all of them; writes mutations.json and the table in docs/
    python benchmarks/quality/mutations.py --only "sign of the target flipped"     # prints, writes nothing

Every fault is silent: the code runs on and trains, with wrong numbers. A fault that no test notices, or that stops a
test before its own assertions (in an import or a fixture) and does nothing else, has survived: exit status 1.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gesso.core.provenance import provenance

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PACKAGE = ROOT / "src" / "gesso"
RESULT = HERE / "mutations.json"
PAGE = ROOT / "docs" / "quality.md"

STEP = "tests/quality/test_quality_whole_step.py"
STEP_CAPTIONS = f"{STEP}::test_the_denoiser_reads_the_caption_of_the_picture_as_diffusers_encodes_it"
STEP_SIZES = f"{STEP}::test_the_denoiser_is_told_the_size_and_crop_that_diffusers_would_tell"
STEP_NOISE = f"{STEP}::test_the_denoiser_sees_the_picture_of_the_file_at_the_noise_level_of_diffusers"
STEP_FILES = f"{STEP}::test_every_file_of_a_run_carries_the_strength_that_was_trained"
STEP_LOSS = f"{STEP}::test_the_loss_is_the_weighted_error_in_the_noise"
LESSONS = "tests/quality/test_quality_lessons.py"
LAWS = "tests/laws"
ORACLES = "tests/oracles"
DATA = "tests/unit/data"
EXPORT = (
    "tests/unit/export/test_export_lora.py::test_a_user_of_diffusers_gets_the_trained_weights",
    "tests/unit/export/test_export_lora.py::test_a_comfyui_like_reader_finds_every_key_and_the_same_change",
)


@dataclass(frozen=True)
class Fault:
    """One exact replacement in one file, and the tests that are run against it."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


ASKED = (
    Fault(
        "text-encoder LoRA silently not trained",
        "training/policy.py",
        "        return self.family.condition(text, batch.geometry)",
        "        text = {name: tensor.detach() for name, tensor in text.items()}\n"
        "        return self.family.condition(text, batch.geometry)",
        (
            f"{LAWS}/test_law_parts.py::test_trained_parts[True-None-parts1-1]",
            f"{LESSONS}::test_text_encoders_learn_too",
        ),
    ),
    Fault(
        "captions shuffled between images, in each batch",
        "data/loader.py",
        "captions = tuple(v.caption for v in visits)",
        "captions = tuple(v.caption for v in reversed(visits))",
        (STEP_CAPTIONS, f"{LESSONS}::test_captions_decide_what_is_learnt", f"{DATA}/test_data_loader.py::TestPairing"),
    ),
    Fault(
        "captions shuffled between images, when they are read",
        "data/sources.py",
        "caption = read_text(side) if side.is_file() else None",
        "side = images[images.index(path) - 1].with_suffix(ending)\n"
        "            caption = read_text(side) if side.is_file() else None",
        (STEP_CAPTIONS, f"{LESSONS}::test_captions_decide_what_is_learnt"),
    ),
    Fault(
        "alpha ignored at export, kohya's format",
        "export/lora.py",
        'tensors[f"{names[layer]}.alpha"] = _alpha(pair, dtype)',
        'tensors[f"{names[layer]}.alpha"] = torch.tensor(float(pair.rank)).to(dtype)',
        (STEP_FILES, *EXPORT),
    ),
    Fault(
        "alpha ignored at export, diffusers' format",
        "export/lora.py",
        "if fold_alpha else settings\n",
        "\n",
        (STEP_FILES, *EXPORT),
    ),
    Fault(
        "alpha ignored in checkpoints",
        "adapters.py",
        'del config["auto_mapping"]',
        'del config["auto_mapping"]\n            config["lora_alpha"] = config["r"]',
        (
            STEP_FILES,
            f"{ORACLES}/test_oracle_lora.py::test_diffusers_loads_the_same_model",
        ),
    ),
    Fault(
        "wrong time ids: all zero",
        "families/sdxl.py",
        "time_ids = torch.tensor(geometry, dtype=torch.float32,",
        "time_ids = torch.zeros(len(geometry), 6, dtype=torch.float32,",
        (STEP_SIZES, f"{ORACLES}/test_oracle_sdxl.py::test_time_ids_are_in_diffusers_order"),
    ),
    Fault(
        "wrong time ids: every picture uncropped and of the bucket's size",
        "data/buckets.py",
        "return Geometry(height, width, top, left, self.bucket[1], self.bucket[0])",
        "return Geometry(self.bucket[1], self.bucket[0], 0, 0, self.bucket[1], self.bucket[0])",
        (STEP_SIZES, f"{DATA}/test_data_buckets.py::TestVisits"),
    ),
    Fault(
        "wrong time ids: crop corner swapped",
        "data/buckets.py",
        "return Geometry(height, width, top, left, self.bucket[1], self.bucket[0])",
        "return Geometry(height, width, left, top, self.bucket[1], self.bucket[0])",
        (STEP_SIZES, f"{DATA}/test_data_buckets.py::TestVisits"),
    ),
    Fault(
        "wrong time ids: width before height",
        "data/buckets.py",
        "return Geometry(height, width, top, left, self.bucket[1], self.bucket[0])",
        "return Geometry(width, height, top, left, self.bucket[0], self.bucket[1])",
        (STEP_SIZES, f"{DATA}/test_data_buckets.py::TestVisits"),
    ),
    Fault(
        "sign of the target flipped",
        "core/noise.py",
        "            return noise.float()\n",
        "            return -noise.float()\n",
        (
            STEP_LOSS,
            f"{LESSONS}::test_the_base_model_is_at_home_in_training",
            f"{LESSONS}::test_the_character_is_learnt",
        ),
    ),
    Fault(
        "EMA never stepped",
        "training/loop.py",
        "            learner.average.update(learner.step)",
        "            pass",
        (
            f"{STEP}::test_the_average_is_that_of_the_weights_that_were_saved",
            f"{LESSONS}::test_the_average_is_what_pictures_show",
            f"{LESSONS}::test_the_character_is_learnt",
        ),
    ),
)
"""The faults that this check was asked for, each against tests of quality and laws."""

MORE = (
    Fault(
        "sign of the target flipped, v-prediction",
        "core/noise.py",
        "return signal * noise.float() - sigma * latents.float()",
        "return sigma * latents.float() - signal * noise.float()",
        (f"{ORACLES}/test_oracle_diffusers.py::test_add_noise_and_velocity",),
    ),
    Fault(
        "v-prediction trained towards the noise",
        "core/noise.py",
        "return signal * noise.float() - sigma * latents.float()",
        "return noise.float()",
        (f"{ORACLES}/test_oracle_noise.py",),
    ),
    Fault(
        "min-SNR inverted",
        "core/noise.py",
        "clipped = snr.clamp(max=min_snr_gamma)",
        "clipped = snr.clamp(min=min_snr_gamma)",
        (STEP_LOSS, f"{ORACLES}/test_oracle_noise.py::test_min_snr_weights"),
    ),
    Fault(
        "min-SNR of v-prediction divided by SNR, not SNR + 1",
        "core/noise.py",
        'if self.prediction == "epsilon" else snr + 1',
        'if self.prediction == "epsilon" else snr',
        (f"{ORACLES}/test_oracle_noise.py",),
    ),
    Fault(
        "timesteps shifted by one",
        "core/noise.py",
        "return (first + torch.floor(u * (last - first)).long()).clamp_(max=last - 1)",
        "return (first + 1 + torch.floor(u * (last - first)).long()).clamp_(max=last - 1)",
        (STEP_NOISE, f"{ORACLES}/test_oracle_denoise.py::test_timestep_range_is_kept_and_its_ends_are_reached"),
    ),
    Fault(
        "pooled text embedding zeroed",
        "families/sdxl.py",
        'added = {"text_embeds": cond["pooled"].to(dtype),',
        'added = {"text_embeds": 0 * cond["pooled"].to(dtype),',
        (STEP_CAPTIONS,),
    ),
    Fault(
        "last hidden state of the text encoders instead of the last but one",
        "families/sdxl.py",
        "states = output.hidden_states[-2]",
        "states = output.hidden_states[-1]",
        (STEP_CAPTIONS,),
    ),
    Fault(
        "VAE's scaling factor forgotten",
        "families/sdxl.py",
        '(config.get("shift_factor") or 0.0)) * config["scaling_factor"]',
        '(config.get("shift_factor") or 0.0))',
        (STEP_NOISE, f"{LESSONS}::test_the_base_model_is_at_home_in_training"),
    ),
    Fault(
        "LoRA scale applied twice",
        "adapters.py",
        'a, b, self.scaling["default"])',
        'a, b, self.scaling["default"] ** 2)',
        (f"{ORACLES}/test_oracle_lora.py::test_one_layer_equals_the_merged_weight",),
    ),
    Fault(
        "LoRA scale left out of the gradient",
        "core/fused.py",
        "if ctx.scale != 1:",
        "if False:",
        (f"{ORACLES}/test_oracle_lora.py::test_fused_layer_against_the_formula_and_plain_autograd",),
    ),
    Fault(
        "LoRA dropout on in evaluation",
        "adapters.py",
        "        network.train(training)  # peft's",
        "        # peft's",
        (f"{ORACLES}/test_oracle_lora.py::test_dropout_is_on_only_where_the_network_trains",),
    ),
    Fault(
        "caption dropout always on",
        "data/buckets.py",
        'dropped = data.caption_dropout > 0 and draws.uniform("caption dropout")[0] < data.caption_dropout',
        "dropped = data.caption_dropout > 0",
        (f"{DATA}/test_data_buckets.py::TestVisits",),
    ),
    Fault(
        "crop of a flipped picture told as if it were not",
        "data/buckets.py",
        "        if self.flip:\n            left = ",
        "        if False:\n            left = ",
        (f"{DATA}/test_data_buckets.py::TestVisits",),
    ),
    Fault(
        "the same noise in every epoch",
        "core/random.py",
        "return generator(self.seed, domain, self.epoch, sample.id, sample.repeat)",
        "return generator(self.seed, domain, 0, sample.id, sample.repeat)",
        (f"{ORACLES}/test_oracle_draws.py::test_no_draw_repeats_over_seed_epoch_image_repeat_and_domain",),
    ),
    Fault(
        "one noise for the whole batch",
        "core/random.py",
        "rows = [self._generator(domain, s).standard_normal(tuple(shape), np.float32) for s in self.samples]",
        "rows = [self._generator(domain, self.samples[0]).standard_normal(tuple(shape), np.float32)\n"
        "                for s in self.samples]",
        (f"{ORACLES}/test_oracle_draws.py::test_a_row_depends_on_its_own_sample_alone",),
    ),
    Fault(
        "loss divided by the batch, not by the samples of the step",
        "training/loop.py",
        "share = loss(batch.to(runtime.device)).sum() / samples",
        "share = loss(batch.to(runtime.device)).mean()",
        (f"{LAWS}/test_law_invariance.py::test_splits_of_a_step_give_one_gradient[0-lora-False]",),
    ),
    Fault(
        "gradients not zeroed between steps",
        "training/loop.py",
        "        group.gradient.zero_()",
        "        pass",
        (f"{LAWS}/test_law_resume.py::test_resumed_equals_uninterrupted[plain]",),
    ),
    Fault(
        "gradient clipping skipped",
        "training/optim.py",
        "    if norm > limit:\n",
        "    if False:\n",
        (f"{ORACLES}/test_oracle_optim.py::test_clipping_against_float64",),
    ),
    Fault(
        "optimiser state forgotten on resume",
        "training/session.py",
        "        optim.restore(learner.optimizer, saved.optimizer)\n",
        "",
        (f"{LAWS}/test_law_resume.py::test_resumed_equals_uninterrupted[plain]",),
    ),
    Fault(
        "averaged weights left in the model after a preview",
        "training/ema.py",
        "            self._load(trained)",
        "            pass",
        (
            f"{LAWS}/test_law_invariance.py"
            "::test_settings_without_effect_leave_the_weights_alone[previews every step-lora]",
            f"{ORACLES}/test_oracle_optim.py::test_average_in_place_and_back_bit_for_bit",
        ),
    ),
    Fault(
        "pictures and files from the last weights, not from the average",
        "evaluation/models.py",
        "    if wanted and average.is_dir():",
        "    if use_ema and average.is_dir():",
        (
            f"{LESSONS}::test_the_average_is_what_pictures_show",
            "tests/unit/evaluation/test_open_pipeline.py"
            "::test_averaged_weights_are_used_where_the_run_samples_with_them",
        ),
    ),
    Fault(
        "warm-up ends one step late",
        "core/schedule.py",
        "        if step < warmup:\n            return (step + 1) / (warmup + 1)",
        "        if step <= warmup:\n            return step / (warmup + 1)",
        (f"{ORACLES}/test_oracle_schedule.py",),
    ),
    Fault(
        "validation at random timesteps",
        "data/loader.py",
        "u=torch.full((len(visits),), (k + 0.5) / timesteps),",
        "u=None,",
        (f"{DATA}/test_data_loader.py::TestValidation",),
    ),
    Fault(
        "repeats of a source ignored",
        "data/buckets.py",
        "for repeat in range(row.repeats)]",
        "for repeat in range(1)]",
        (f"{DATA}/test_data_buckets.py::TestOrder",),
    ),
)
"""Faults of the same kind that trainers are known to have had."""


def main() -> int:
    """Run the faults, print the table, and write it unless only some were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", help="name of a fault; can be given several times")
    parser.add_argument("--table", action="store_true", help="only write the table in docs/ again")
    args = parser.parse_args()
    if args.table:
        write_table(json.loads(RESULT.read_text())["faults"])
        return 0
    faults = [f for f in (*ASKED, *MORE) if not args.only or f.name in args.only]
    if not faults:
        parser.error(f"no such fault; there are: {'; '.join(f.name for f in (*ASKED, *MORE))}")
    began = time.monotonic()
    check_clean(sorted({test for fault in faults for test in fault.tests}))
    rows = []
    for fault in faults:
        rows.append(row := measure(fault))
        print(f"{'caught' if row['caught'] else 'SURVIVED':9} {row['seconds']:5.0f} s  {fault.name}", flush=True)
        for test in row["failed"]:
            print(f"{'':19}{test}")
    if not args.only:
        record = {"provenance": provenance(), "seconds": round(time.monotonic() - began), "faults": rows}
        RESULT.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        write_table(rows)
    survived = [row["fault"] for row in rows if not row["caught"]]
    print(f"{len(rows) - len(survived)} of {len(rows)} faults caught")
    return 1 if survived else 0


def check_clean(tests: Sequence[str]) -> None:
    """The tests must pass on the package as it is, or a failure would prove nothing."""
    with tempfile.TemporaryDirectory() as folder:
        copy_package(Path(folder))
        outcome = run_tests(Path(folder), tests)
    if outcome["failed"] or outcome["stopped"]:
        names = "\n  ".join(outcome["failed"] + outcome["stopped"])
        sys.exit(f"these fail on the package as it is, so nothing can be checked:\n  {names}")
    print(f"{outcome['passed']} tests pass on the package as it is ({outcome['seconds']:.0f} s)", flush=True)


def measure(fault: Fault) -> dict[str, Any]:
    """Run the fault's tests against a package with the fault."""
    with tempfile.TemporaryDirectory() as folder:
        seed(copy_package(Path(folder)), fault)
        outcome = run_tests(Path(folder), fault.tests)
    return {
        "fault": fault.name,
        "file": f"src/gesso/{fault.file}",
        "asked": fault in ASKED,
        "caught": bool(outcome["failed"]),
        **outcome,
    }


def copy_package(folder: Path) -> Path:
    """The package's source in `folder`; the weights, which no fault touches, by a link."""
    copied = folder / "gesso"
    shutil.copytree(PACKAGE, copied, ignore=shutil.ignore_patterns("__pycache__", "weights"))
    if (PACKAGE / "micro" / "weights").is_dir():
        (copied / "micro" / "weights").symlink_to(PACKAGE / "micro" / "weights")
    return copied


def seed(package: Path, fault: Fault) -> None:
    """Put the fault in; its old text must be there exactly once, and the file must still compile."""
    path = package / fault.file
    text = path.read_text(encoding="utf-8")
    if (count := text.count(fault.old)) != 1:
        sys.exit(f"'{fault.name}': its text is {count} times in {fault.file}, so the fault cannot be seeded")
    changed = text.replace(fault.old, fault.new)
    compile(changed, str(path), "exec")
    path.write_text(changed, encoding="utf-8")


def run_tests(folder: Path, tests: Sequence[str]) -> dict[str, Any]:
    """Run tests of the checkout against the package in `folder`, by pytest's own report.

    `failed` are tests whose assertions (or the code under them) failed, `stopped` those that did not get that far.
    """
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    environment["GESSO_CACHE"] = str(folder / "cache")
    where = "import gesso, sys; sys.stdout.write(gesso.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", where], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout
    if Path(found).resolve() != (folder / "gesso" / "__init__.py").resolve():
        sys.exit(f"the tests would run against {found}, not against the copy")
    report, began = folder / "report.xml", time.monotonic()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *tests]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        sys.exit(f"pytest could not run ({done.returncode}):\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    return {
        "failed": [_name(case) for case in cases if case.find("failure") is not None],
        "stopped": [_name(case) for case in cases if case.find("error") is not None],
        "passed": sum(case.find("failure") is None and case.find("error") is None for case in cases),
        "seconds": round(time.monotonic() - began, 1),
    }


def _name(case: ElementTree.Element) -> str:
    """tests/laws/test_law_parts.py::test_trained_parts[...] in short: test_law_parts.test_trained_parts."""
    parts = [p for p in case.get("classname", "").split(".") if p not in ("tests", "unit")]
    return ".".join([*parts, re.sub(r"\[.*", "", case.get("name", ""))])


def write_table(rows: Sequence[dict[str, Any]]) -> None:
    """Put the table into the page, between its marks."""
    lines = ["| fault | caught by |", "|---|---|"]
    for row in rows:
        tests = list(dict.fromkeys(name.rpartition(".")[2] for name in row["failed"]))
        shown = ", ".join(f"`{name}`" for name in tests[:3]) + (f" and {len(tests) - 3} more" if len(tests) > 3 else "")
        name = f"**{row['fault']}**" if row["asked"] else row["fault"]
        lines.append(f"| {name} | {shown or 'nothing: it survived'} |")
    between(PAGE, "mutations", "\n".join(lines))


def between(page: Path, mark: str, text: str) -> None:
    """Replace what stands between `<!-- mark -->` and `<!-- /mark -->`."""
    start, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    content = page.read_text(encoding="utf-8")
    head, _, rest = content.partition(start)
    _, found, tail = rest.partition(end)
    if not found:
        sys.exit(f"{page} has no marks {start} and {end}")
    page.write_text(f"{head}{start}\n{text}\n{end}{tail}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
