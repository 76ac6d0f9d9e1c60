"""A model card, and the way to the Hugging Face hub. Imports no torch; no token is read, kept or written here."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from gesso.config.run import RunConfig
from gesso.core.folder import WEIGHTS, RunFolder, write_atomic
from gesso.errors import ResourceError, UserError
from gesso.export.about import About

_KNOWN_LICENSES = {"stabilityai/stable-diffusion-xl-base-1.0": "openrail++"}
_MOST_SAMPLES = 8


@dataclass(frozen=True)
class Sample:
    """A picture of the card: its file, and what it was drawn from."""

    file: Path
    prompt: str
    negative: str = ""


def publish(path: Path, run: RunConfig, *, about: About, repo: str, private: bool = True) -> str:
    """Put an exported LoRA file on the hub with a card and the run's newest previews; returns the page's address.

    What is sent is laid out first in a folder beside the file, `<its name>-hub`, which stays: a failed upload can be
    tried again from there. Raises as `push` does.
    """
    samples = newest_samples(run)
    folder = path.with_name(f"{path.stem}-hub")
    shutil.rmtree(folder, ignore_errors=True)
    diffusers = not _is_kohya(path)
    weights = WEIGHTS if diffusers else path.name
    try:
        (folder / "images").mkdir(parents=True)
        shutil.copyfile(path, folder / weights)
        placed = []
        for sample in samples:
            file = folder / "images" / sample.file.name
            shutil.copyfile(sample.file, file)
            placed.append(Sample(file.relative_to(folder), sample.prompt, sample.negative))
        text = card(about, settings=settings(run), samples=placed, weights=weights, repo=repo)
        write_atomic(folder / "README.md", text.encode())
    except OSError as error:
        raise ResourceError(
            f"the folder for the hub cannot be written ({error.strerror})", where=str(folder), fix="free space there"
        ) from error
    return push(folder, repo, private=private)


def push(folder: Path, repo: str, *, private: bool = True) -> str:
    """Upload a folder as a model repository, creating it if need be; returns the page's address.

    Uses the login of `hf auth login` or HF_TOKEN. An existing repository keeps its visibility and its other files.
    Raises `UserError` where the hub refuses and `ResourceError` where it cannot be reached; `folder` is only read.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        url = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message="LoRA weights from gesso")
    except Exception as error:  # whatever the hub's client and its network library raise
        raise _failure(error, folder, repo) from error
    return str(url)


def card(about: About, *, settings: dict[str, str], samples: Sequence[Sample], weights: str, repo: str) -> str:
    """README.md of a model repository: front matter that the hub reads, use in diffusers, settings and pictures."""
    front: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
    if about.base_on_hub:
        front["base_model"] = about.base
    license = about.license or base_license(about.base)
    if license:
        front["license"] = license
    if about.trigger:
        front["instance_prompt"] = about.trigger
    family = "stable-diffusion-xl" if about.architecture.startswith("stable-diffusion-xl") else about.architecture
    front["tags"] = ["lora", "text-to-image", "diffusers", family, "template:sd-lora"]
    if samples:
        front["widget"] = [_widget(sample) for sample in samples]
    parts = [f"---\n{_yaml(front)}---\n", f"# {about.title}\n"]
    parts.append(about.description or f"A LoRA for {about.base_name}, trained with gesso.")
    if samples:
        parts.append("\n<Gallery />")
    if about.trigger:
        words = ", ".join(f"`{trigger}`" for trigger in about.triggers)
        which = "" if len(about.triggers) == 1 else ", each for what it stands for"
        parts.append(f"\n## Trigger words\n\nUse {words} in the prompt{which}.")
    parts.append(f"\n## Use\n\n```python\n{_usage(about, samples, weights, repo)}```")
    rows = "\n".join(f"| {name} | {value} |" for name, value in settings.items())
    parts.append(f"\n## Training\n\n| setting | value |\n|---|---|\n{rows}")
    if license:
        parts.append(f"\n## License\n\nThat of the base model: {license}.")
    return "\n".join(parts) + "\n"


def settings(run: RunConfig) -> dict[str, str]:
    """The settings that someone who wants to repeat the training asks for first."""
    adapter, training = run.adapter, run.training
    length = " or ".join(f"{n} {unit}" for n, unit in ((training.steps, "steps"), (training.epochs, "epochs")) if n)
    found = {
        **adapter.summary(),
        "text encoders": "trained" if adapter.train_text_encoders else "frozen",
        "length": length,
        "learning rate": f"{training.learning_rate:g}, {training.schedule.type}",
        "batch": f"{training.batch_size} x {training.accumulation} accumulated",
        "optimiser": training.optimizer.type,
        "precision": training.precision,
        "resolution": str(run.data.resolution),
        "averaged weights": f"up to {training.ema.decay:g}" if training.ema.enabled else "no",
        "seed": str(run.seed),
    }
    return {name: value.replace("|", "\\|") for name, value in found.items()}


def newest_samples(run: RunConfig) -> list[Sample]:
    """The previews of the last step that has any, from the run folder."""
    folder = RunFolder(run.folder.expanduser().absolute())
    try:
        lines = (folder.samples / "index.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    rows = [json.loads(line) for line in lines]
    last = max((row["step"] for row in rows), default=0)
    # A resumed run draws some previews twice; the later line holds.
    files = {
        row["file"]: Sample(folder.path / row["file"], row["prompt"], row["negative"])
        for row in rows
        if row["step"] == last
    }
    return [sample for sample in files.values() if sample.file.is_file()][:_MOST_SAMPLES]


def base_license(base: str) -> str:
    """The hub's short name of a base model's license, from its own card where it is a folder here; "" if unknown."""
    if base in _KNOWN_LICENSES:
        return _KNOWN_LICENSES[base]
    readme = Path(base).expanduser() / "README.md"
    if not readme.is_file():
        return ""
    pieces = readme.read_text(encoding="utf-8", errors="replace").split("---\n")
    try:
        front = YAML(typ="safe").load(pieces[1]) if len(pieces) > 2 and not pieces[0].strip() else None
    except YAMLError:
        return ""
    return str(front["license"]) if isinstance(front, dict) and "license" in front else ""


def _is_kohya(path: Path) -> bool:
    from safetensors import safe_open

    with safe_open(str(path), framework="np") as handle:
        return any(key.startswith("lora_") for key in handle.keys())  # noqa: SIM118


def _widget(sample: Sample) -> dict[str, Any]:
    entry: dict[str, Any] = {"text": sample.prompt, "output": {"url": sample.file.as_posix()}}
    if sample.negative:
        entry["parameters"] = {"negative_prompt": sample.negative}
    return entry


def _usage(about: About, samples: Sequence[Sample], weights: str, repo: str) -> str:
    prompt = samples[0].prompt if samples else (about.triggers or ("a photo",))[0]
    named = "" if weights == WEIGHTS else f", weight_name={json.dumps(weights)}"
    base = json.dumps(about.base_name)
    return (
        "import torch\n"
        "from diffusers import AutoPipelineForText2Image\n\n"
        f"pipeline = AutoPipelineForText2Image.from_pretrained({base}, torch_dtype=torch.float16)\n"
        f"pipeline.load_lora_weights({json.dumps(repo)}{named})\n"
        'pipeline.to("cuda")\n'
        f"image = pipeline({json.dumps(prompt, ensure_ascii=False)}).images[0]\n"
    )


def _yaml(content: dict[str, Any]) -> str:
    yaml = YAML()
    yaml.width = 4096
    text = io.StringIO()
    yaml.dump(content, text)
    return text.getvalue()


def _failure(error: Exception, folder: Path, repo: str) -> UserError:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    again = f"nothing is lost; try again with: hf upload {repo} {folder}"
    if isinstance(error, HFValidationError):
        return UserError(f"'{repo}' is not a repository name", where="--push-to-hub", fix="use user/name")
    if isinstance(error, LocalTokenNotFoundError):
        return UserError("not logged in to the hub", where=repo, fix=f"hf auth login; {again}")
    if isinstance(error, HfHubHTTPError):
        code = error.response.status_code
        if code in (401, 403):
            return UserError(
                f"the hub refused the upload ({code})",
                where=repo,
                fix=f"log in with a token that may write there: hf auth login; {again}",
            )
        return ResourceError(f"the hub could not take the upload ({code})", where=repo, fix=again)
    return ResourceError(f"the hub cannot be reached ({type(error).__name__})", where=repo, fix=again)
