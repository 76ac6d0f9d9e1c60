"""Prompt files of sd-scripts: a prompt a line, with flags such as --n, --w and --s behind it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from gesso.config.dialects.draft import Draft, Item, number

_FLAG = re.compile(r"\s--([a-z]+)\s+")
_FLAGS = {"n": "negative", "w": "width", "h": "height", "d": "seed", "s": "inference_steps", "l": "guidance"}
_IGNORED = {"ss": "the model's own sampler is used"}
_REFUSED = {
    "g": "distilled guidance belongs to FLUX",
    "fs": "the shift of the schedule belongs to flow matching",
    "cn": "ControlNet comes in a later version",
    "ctr": "belongs to Lumina",
    "rcfg": "belongs to Lumina",
}


def lay(draft: Draft, item: Item) -> None:
    """Read the file that `sample_prompts` names as previews."""
    path = Path(draft.path(str(item.value)))
    if path.suffix.lower() != ".txt":
        fix = "write the prompts one a line into a .txt file"
        draft.refuse(item, f"{path.suffix or 'such'} files of prompts are not read", fix=fix)
        return
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        draft.problem(item, f"{item.key}: {path} cannot be read ({type(error).__name__})", fix="check the path")
        return
    prompts: list[str] = []
    settings: dict[str, tuple[Any, Item]] = {}
    for i, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        prompt, *parts = _FLAG.split(f" {text} ")
        prompts.append(prompt.strip())
        for flag, value in zip(parts[::2], parts[1::2], strict=True):
            _flag(draft, Item((f"--{flag}",), value.strip(), i, str(path)), flag, settings, first=len(prompts) == 1)
    if prompts:
        draft.set("preview.prompts", prompts, item)
    else:
        draft.ignore(item, "the file holds no prompt")
    for native, (value, origin) in settings.items():
        draft.set(f"preview.{native}", value, origin)


def _flag(draft: Draft, item: Item, flag: str, settings: dict[str, tuple[Any, Item]], *, first: bool) -> None:
    if flag in _IGNORED:
        draft.ignore(item, _IGNORED[flag])
    elif flag in _REFUSED:
        draft.refuse(item, _REFUSED[flag])
    elif flag not in _FLAGS:
        draft.problem(item, f"unknown flag {item.key}", fix=f"known: {', '.join(f'--{name}' for name in _FLAGS)}")
    else:
        native = _FLAGS[flag]
        value = item.value if native == "negative" else number(item.value)
        if native in settings and settings[native][0] == value:
            return
        if native == "seed" and not first:
            draft.ignore(item, "picture i is drawn with the first seed + i")
        elif native in settings or not first:
            draft.ignore(item, "all previews are drawn with the settings of the first prompt")
        else:
            settings[native] = (value, item)
