"""The run files that ship with the package, to start from."""

from __future__ import annotations

from importlib import resources

from gesso.config import document, schema
from gesso.config.document import Document
from gesso.errors import UserError


def names() -> tuple[str, ...]:
    """All presets."""
    folder = resources.files("gesso.config").joinpath("presets")
    return tuple(sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml")))


def get(name: str, *, where: str = "") -> Document:
    """A preset's values. Raises `UserError` for a name that is not there."""
    if name not in names():
        near = schema.nearest(name, names())
        fix = f"did you mean {near}?" if near else f"there are {', '.join(names())}"
        raise UserError(f"there is no preset '{name}'", where=where, fix=fix)
    return document.parse(text(name), file=f"preset {name}")


def text(name: str) -> str:
    """A preset as it stands in the package, comments included."""
    return resources.files("gesso.config").joinpath("presets", f"{name}.yaml").read_text("utf-8")


def about(name: str) -> str:
    """The comment at the top of a preset: what it is for."""
    lines = []
    for line in text(name).splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").rstrip())
    return " ".join(lines)


def prompts(name: str, trigger: str) -> list[str]:
    """Preview prompts for a trigger word, suited to what the preset teaches; the last leaves the word out."""
    if name == "style":
        subjects = ("a lighthouse on a cliff", "a cat asleep on a chair", "a street market in the rain")
        return [*(f"{subject}, {trigger}" for subject in subjects), "a lighthouse on a cliff"]
    return [
        f"a photo of {trigger}",
        f"{trigger} smiling, portrait",
        f"{trigger} on a mountain path",
        "a photo of a dog",
    ]
