"""Several classes in one run: which folder is filled from what, and the settings that would do nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gesso.config import advice, class_images, document, files
from gesso.config.class_images import ClassFolder
from gesso.config.forecast import forecast
from gesso.config.run import RunConfig
from gesso.errors import Problems, UserError

MAN, DOG = "a photo of a man", "a photo of a dog"


def run(folder: Path, objective: dict[str, Any], *sources: dict[str, Any]) -> RunConfig:
    """A run on sources that are called one, two, ...; all exist but those with a prior's prompt of their own."""
    listed = []
    for name, source in zip(("one", "two", "three", "four"), sources, strict=False):
        listed.append({"path": str(folder / name), **source})
        if source.get("role") != "prior" or "class_prompt" not in source:
            (folder / name).mkdir(exist_ok=True)
        if source.get("role") != "prior":
            (folder / name / "1.png").write_bytes(b"")
    values = {"output": str(folder / "out"), "objective": objective, "data": {"sources": listed}}
    text = document.emit(values | {"training": {"steps": 5}})
    return files.load_text(text, folder=folder).run


def errors(folder: Path, objective: dict[str, Any], *sources: dict[str, Any]) -> dict[str, str]:
    found = advice.check(run(folder, objective, *sources)).errors
    return {f.key: f"{f.what} -> {f.fix}" for f in found if f.key.startswith(("data", "objective"))}


PRIOR: dict[str, Any] = {"role": "prior"}
BOTH: tuple[dict[str, Any], ...] = ({}, {}, PRIOR | {"class_prompt": MAN}, PRIOR | {"class_prompt": DOG})
IMAGES: dict[str, Any] = {"type": "dreambooth"}
MODEL: dict[str, Any] = {"type": "dreambooth", "prior": "model"}


def test_each_class_has_a_folder_a_prompt_and_a_number(tmp_path: Path) -> None:
    three, four = tmp_path / "three", tmp_path / "four"
    assert class_images.folders(run(tmp_path, IMAGES, *BOTH)) == (
        ClassFolder(2, three, MAN, 200),
        ClassFolder(3, four, DOG, 200),
    )
    own = (*BOTH[:3], BOTH[3] | {"class_images": 9})
    assert [one.count for one in class_images.folders(run(tmp_path, IMAGES | {"class_images": 50}, *own))] == [50, 9]
    mixed = ({}, {}, PRIOR, BOTH[3])
    found = class_images.folders(run(tmp_path, IMAGES | {"class_prompt": MAN}, *mixed))
    assert [one.prompt for one in found] == [MAN, DOG], "the objective's is for sources that say nothing"
    assert [one.source for one in class_images.folders(run(tmp_path, IMAGES, *mixed))] == [3], "as it is without"
    assert class_images.folders(run(tmp_path, MODEL | {"class_prompt": MAN}, {})) == ()
    assert class_images.folders(run(tmp_path, {"type": "denoise"}, {})) == ()


def test_what_is_missing_and_what_is_empty(tmp_path: Path) -> None:
    made = run(tmp_path, IMAGES | {"class_images": 3}, *BOTH)
    (tmp_path / "four").mkdir()
    (tmp_path / "four" / "mine.jpg").write_bytes(b"")
    assert [one.missing for one in class_images.folders(made)] == [3, 2]
    assert class_images.empty(made) == {2}
    left = class_images.without(made, class_images.empty(made))
    assert [Path(source.path).name for source in left.data.sources] == ["one", "two", "four"]
    numbers = forecast(made)
    assert numbers is not None
    assert numbers.images == (1, 1, 3, 3)


def test_the_prompts_of_the_models_own_prior(tmp_path: Path) -> None:
    made = run(tmp_path, MODEL | {"class_prompt": MAN}, {}, {"class_prompt": DOG})
    assert class_images.prompts(made) == (MAN, DOG)
    assert class_images.prompts(run(tmp_path, IMAGES, *BOTH)) == ()
    with pytest.raises(UserError, match="not said what the class") as caught:
        class_images.prompts(run(tmp_path, MODEL, {}, {"class_prompt": DOG}))
    assert caught.value.where == "data.sources.0.class_prompt"


ACCEPTED: list[tuple[dict[str, Any], tuple[dict[str, Any], ...]]] = [
    (IMAGES, BOTH),
    (IMAGES | {"class_prompt": MAN}, ({}, PRIOR)),
    (IMAGES | {"class_prompt": MAN, "class_images": 9}, ({}, PRIOR, BOTH[3] | {"class_images": 5})),
    (MODEL, ({"class_prompt": MAN}, {"class_prompt": DOG})),
    (MODEL | {"class_prompt": MAN}, ({}, {"class_prompt": DOG})),
    (IMAGES, ({}, PRIOR | {"class_prompt": MAN, "caption_extension": ".txt", "layout": "folder"})),
]


@pytest.mark.parametrize(("objective", "sources"), ACCEPTED)
def test_accepted(tmp_path: Path, objective: dict[str, Any], sources: tuple[dict[str, Any], ...]) -> None:
    assert errors(tmp_path, objective, *sources) == {}


REFUSED: dict[str, tuple[dict[str, Any], tuple[dict[str, Any], ...], str, str]] = {
    "denoising has no classes": (
        {"type": "denoise"},
        ({"class_prompt": MAN},),
        "data.sources.0.class_prompt",
        "means nothing to objective denoise",
    ),
    "nor numbers of their images": (
        {"type": "denoise"},
        ({"class_images": 5},),
        "data.sources.0.class_images",
        "means nothing to objective denoise",
    ),
    "a prompt on the wrong side": (
        IMAGES,
        ({"class_prompt": MAN}, PRIOR),
        "data.sources.0.class_prompt",
        "this has role: instance -> move it to the source of its class images",
    ),
    "a number on the wrong side": (IMAGES, ({"class_images": 5}, PRIOR), "data.sources.0.class_images", "role: prior"),
    "a number without a prompt": (
        IMAGES,
        ({}, PRIOR | {"class_images": 5}),
        "data.sources.1.class_images",
        "there is none -> add class_prompt",
    ),
    "a number for all without a prompt": (
        IMAGES | {"class_images": 5},
        ({}, PRIOR),
        "objective.class_images",
        "there is none -> add class_prompt",
    ),
    "a number for all that nobody takes": (
        IMAGES | {"class_images": 5},
        ({}, BOTH[2] | {"class_images": 6}),
        "objective.class_images",
        "a number of its own",
    ),
    "a prompt for all that nobody takes": (
        IMAGES | {"class_prompt": MAN},
        ({}, BOTH[3]),
        "objective.class_prompt",
        "one of its own, so it has no effect",
    ),
    "a prompt that two might mean": (
        IMAGES | {"class_prompt": MAN},
        ({}, PRIOR, PRIOR),
        "objective.class_prompt",
        "2 sources with role: prior have no class_prompt, and it is not clear which",
    ),
    "one prompt twice": (
        IMAGES,
        ({}, BOTH[2], BOTH[2]),
        "data.sources.2.class_prompt",
        "would give the same pictures here",
    ),
    "the model's prior without a prompt": (MODEL, ({}, {}), "objective.class_prompt", "write class_prompt: a photo"),
    "or for one of two": (MODEL, ({"class_prompt": MAN}, {}), "data.sources.1.class_prompt", "what the class is"),
    "or for nobody": (
        MODEL | {"class_prompt": MAN},
        ({"class_prompt": DOG},),
        "objective.class_prompt",
        "every source has one of its own",
    ),
    "the model's prior draws nothing": (
        MODEL | {"class_prompt": MAN},
        ({"class_images": 5},),
        "data.sources.0.class_images",
        "takes no class images",
    ),
    "no folder": (
        IMAGES,
        ({}, BOTH[2] | {"path": "hub:a/men"}),
        "data.sources.1.class_prompt",
        "drawn into a folder, and hub:a/men is none",
    ),
    "captions of another kind": (
        IMAGES,
        ({}, BOTH[2] | {"caption_extension": ".caption"}),
        "data.sources.1.caption_extension",
        "captions in .txt files",
    ),
    "folders with repeats": (
        IMAGES,
        ({}, BOTH[2] | {"layout": "kohya"}),
        "data.sources.1.layout",
        "would not be seen",
    ),
}


@pytest.mark.parametrize(("objective", "sources", "key", "words"), REFUSED.values(), ids=REFUSED)
def test_refused(
    tmp_path: Path, objective: dict[str, Any], sources: tuple[dict[str, Any], ...], key: str, words: str
) -> None:
    found = errors(tmp_path, objective, *sources)
    assert list(found) == [key]
    assert words in found[key]


def test_folders_of_classes_lie_apart(tmp_path: Path) -> None:
    inside = BOTH[3] | {"path": str(tmp_path / "three" / "dogs")}
    assert "those of another class" in errors(tmp_path, IMAGES, *BOTH[:3], inside)["data.sources.3.path"]
    mine = ({}, {}, BOTH[2] | {"path": str(tmp_path / "two")}, BOTH[3])
    assert "taken for instances" in errors(tmp_path, IMAGES, *mine)["data.sources.1.path"]


def test_a_blank_prompt_is_refused_at_its_line(tmp_path: Path) -> None:
    with pytest.raises(Problems, match="the class_prompt is blank"):
        run(tmp_path, IMAGES, {}, PRIOR | {"class_prompt": " "})
