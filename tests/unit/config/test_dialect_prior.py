"""Prior preservation in other tools' files and flags."""

from __future__ import annotations

from pathlib import Path

import pytest
from config_guides import PRIOR

from gesso.config import advice, class_images, files
from gesso.config.files import Loaded
from gesso.errors import Problems, UserError
from gesso.objectives import Denoise, DreamBooth

NESTED = """\
model: {base_model_id: "micro:sdxl", finetune_method: METHOD, resolution: 64}
lora: {rank: 4}
dataset: {train_data_dir: data/train}
training: {max_train_steps: 5, snr_gamma: 5.0}
"""
FLAT = {"instance_data_dir": "one", "instance_prompt": "a photo of sks dog", "max_train_steps": "5"}
ON = {"with_prior_preservation": True, "class_data_dir": "class", "class_prompt": "a photo of a dog"}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("one", "data/train"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "1.png").write_bytes(b"")


def nested(tmp_path: Path, fragment: str, method: str = "dreambooth") -> Loaded:
    return files.load_text(NESTED.replace("METHOD", method) + fragment, folder=tmp_path)


def options(tmp_path: Path, **more: object) -> Loaded:
    return files.load_options(FLAT | more, folder=tmp_path)


def notes(loaded: Loaded, kind: str) -> dict[str, str]:
    assert loaded.report is not None
    return {entry.key: entry.note for entry in getattr(loaded.report, kind)}


@pytest.mark.parametrize("method", ["dreambooth", "lora"])
def test_the_block_of_the_guide(tmp_path: Path, method: str) -> None:
    loaded = nested(tmp_path, PRIOR, method)
    run, objective = loaded.run, loaded.run.objective
    assert isinstance(objective, DreamBooth)
    assert (objective.prior_weight, objective.class_prompt, objective.class_images) == (1, "a photo of a person", 200)
    assert objective.min_snr_gamma == 5
    assert [source.role for source in run.data.sources] == ["instance", "prior"]
    assert run.data.sources[1].path == str(tmp_path / "data/class_images")
    assert {f"prior_preservation.{key}" for key in ("enabled", "weight", "class_data_dir", "class_prompt")} <= set(
        notes(loaded, "mapped")
    )
    found = advice.check(run)
    assert [f for f in found.errors if f.key.startswith(("data", "objective"))] == [], "the folder is yet to be made"
    assert found.forecast is not None
    assert found.forecast.images == (1, 200)
    assert found.forecast.samples_per_epoch == 1


def test_the_same_switched_off(tmp_path: Path) -> None:
    loaded = nested(tmp_path, PRIOR.replace("enabled: true", "enabled: false"))
    assert type(loaded.run.objective) is Denoise
    assert len(loaded.run.data.sources) == 1
    ignored = notes(loaded, "ignored")
    assert ignored["prior_preservation.enabled"] == "off"
    assert "prior preservation is off" in ignored["prior_preservation.class_prompt"]
    assert not notes(loaded, "refused")


def test_the_flags_of_the_script(tmp_path: Path) -> None:
    loaded = options(tmp_path, **ON, prior_loss_weight="0.5", num_class_images="40", use_lora=True)
    objective = loaded.run.objective
    assert isinstance(objective, DreamBooth)
    assert (objective.prior_weight, objective.class_images, objective.prior) == (0.5, 40, "images")
    one, of_class = loaded.run.data.sources
    assert (one.trigger, of_class.trigger, of_class.missing_captions) == (
        "a photo of sks dog",
        "a photo of a dog",
        "trigger",
    )
    assert loaded.origins["objective.class_images"] == "command line"
    assert options(tmp_path, **ON).run.objective.class_images == 100  # type: ignore[union-attr]


def test_a_class_prompt_alone_says_that_it_does_nothing(tmp_path: Path) -> None:
    loaded = options(tmp_path, class_prompt="a photo of a dog")
    assert type(loaded.run.objective) is Denoise
    assert notes(loaded, "ignored")["class_prompt"].endswith("with_prior_preservation turns it on")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"with_prior_preservation": True}, ["there is no class_prompt", "there is no class_data_dir"]),
        ({"use_lora": False}, ["finetune_method: full"]),
        ({"use_lora": True, "finetune_method": "full"}, ["use_lora is on, but finetune_method is full"]),
        ({"output_kohya_format": True}, ["gesso export RUN --format kohya"]),
        ({"do_edm_style_training": True}, ["EDM-style training"]),
        ({**ON, "num_class_images": "many"}, ["num_class_images must be a whole number"]),
        ({**ON, "prior_loss_weight": "-1"}, ["prior_loss_weight must be at least 0"]),
    ],
)
def test_what_does_not_go_is_said(tmp_path: Path, more: dict[str, object], words: list[str]) -> None:
    with pytest.raises(Problems) as caught:
        options(tmp_path, **more)
    text = "\n".join(str(problem) for problem in caught.value.problems)
    assert all(word in text for word in words), text


def test_a_class_folder_around_the_instances_is_refused(tmp_path: Path) -> None:
    for folder in ("one", "one/class", "."):
        found = advice.check(options(tmp_path, **{**ON, "class_data_dir": folder}).run)
        assert any("folder of their own" in error.fix for error in found.errors), folder


KOHYA = """\
[[datasets]]
resolution = 64
[[datasets.subsets]]
image_dir = "one"
class_tokens = "sks dog"
[[datasets.subsets]]
image_dir = "dogs"
class_tokens = "dog"
is_reg = true
"""


def test_regularisation_images_of_sd_scripts(tmp_path: Path) -> None:
    (tmp_path / "dogs").mkdir()
    (tmp_path / "set.toml").write_text(KOHYA)
    loaded = files.load_text("data: set.toml\ntraining: {steps: 5}\nobjective: {min_snr_gamma: 5}\n", folder=tmp_path)
    assert isinstance(loaded.run.objective, DreamBooth)
    assert loaded.run.objective.min_snr_gamma == 5
    assert "half of it here" in notes(loaded, "assumed")["objective.type"]
    (tmp_path / "set.toml").write_text(KOHYA.replace("is_reg = true\n", ""))
    assert type(files.load_text("data: set.toml\ntraining: {steps: 5}\n", folder=tmp_path).run.objective) is Denoise


TWO = """\
[general]
resolution = 64
caption_extension = ".txt"
[[datasets]]
  [[datasets.subsets]]
  image_dir = "one"
  class_tokens = "sks dog"
  num_repeats = 10
  [[datasets.subsets]]
  image_dir = "data/train"
  class_tokens = "ohwx man"
  num_repeats = 4
  [[datasets.subsets]]
  image_dir = "dogs"
  class_tokens = "dog"
  is_reg = true
  num_repeats = 2
  [[datasets.subsets]]
  image_dir = "men"
  class_tokens = "man"
  is_reg = true
"""


def test_two_concepts_of_sd_scripts_with_a_class_each(tmp_path: Path) -> None:
    for name in ("dogs", "men"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(b"")
    (tmp_path / "set.toml").write_text(TWO)
    options = 'pretrained_model_name_or_path = "micro:sdxl"\nmax_train_steps = 5\nprior_loss_weight = 0.5\n'
    (tmp_path / "config.toml").write_text(
        options + 'dataset_config = "set.toml"\nnetwork_module = "networks.lora"\nnetwork_dim = 4\n'
    )
    loaded = files.load(tmp_path / "config.toml")
    assert isinstance(loaded.run.objective, DreamBooth)
    assert (loaded.run.objective.prior_weight, loaded.run.objective.class_prompt) == (0.5, None)
    found = [(s.role, s.concept, s.missing_captions, s.repeats) for s in loaded.run.data.sources]
    assert found == [
        ("instance", "sks dog", "concept", 10),
        ("instance", "ohwx man", "concept", 4),
        ("prior", "dog", "concept", 2),
        ("prior", "man", "concept", 1),
    ]
    assert class_images.folders(loaded.run) == (), "its regularisation images are taken as they are"
    assert "of several sets of them" in notes(loaded, "assumed")["objective.type"]
    found = advice.check(loaded.run).errors
    assert [f for f in found if f.key.startswith(("data", "objective"))] == []


AITOOLKIT = """\
job: extension
config:
  name: both
  process:
    - type: sd_trainer
      datasets:
        - {folder_path: one, trigger_word: sks dog, num_repeats: 3, resolution: 64}
        - {folder_path: data/train, trigger_word: ohwx man, loss_multiplier: 0.8, resolution: 64}
        - {folder_path: dogs, default_caption: a dog, is_reg: true, loss_multiplier: 0.5, resolution: 64}
        - {folder_path: men, default_caption: a man, is_reg: true, resolution: 64}
      train: {steps: 5, reg_weight: 0.7}
      model: {name_or_path: "micro:sdxl", is_xl: true}
"""


def test_two_concepts_of_ai_toolkit_with_a_class_each(tmp_path: Path) -> None:
    loaded = files.load_text(AITOOLKIT, folder=tmp_path)
    objective = loaded.run.objective
    assert isinstance(objective, DreamBooth)
    assert objective.prior_weight == 0.7
    found = [(s.role, s.trigger or s.concept, s.repeats, s.weight) for s in loaded.run.data.sources]
    assert found == [
        ("instance", "sks dog", 3, 1),
        ("instance", "ohwx man", 1, 0.8),
        ("prior", "a dog", 1, 0.5),
        ("prior", "a man", 1, 1),
    ]
    assert "of several sets of them" in notes(loaded, "assumed")["objective.type"]


CONCEPTS = """\
[
  {"instance_data_dir": "one", "instance_prompt": "photo of sks dog",
   "class_data_dir": "dogs", "class_prompt": "photo of a dog"},
  {"instance_data_dir": "data/train", "instance_prompt": "photo of ohwx man",
   "class_data_dir": "men", "class_prompt": "photo of a man", "num_class_images": 50},
  {"instance_data_dir": "two", "instance_prompt": "photo of zwx dog",
   "class_data_dir": "dogs", "class_prompt": "photo of a dog"},
]
"""
LISTED = {"concepts_list": "concepts.json", "max_train_steps": "5"}


def listed(tmp_path: Path, text: str = CONCEPTS, **more: object) -> Loaded:
    (tmp_path / "two").mkdir(exist_ok=True)
    (tmp_path / "concepts.json").write_text(text)
    return files.load_options(LISTED | more, folder=tmp_path)


def test_a_list_of_concepts_with_their_classes(tmp_path: Path) -> None:
    loaded = listed(tmp_path, with_prior_preservation=True, num_class_images="20", prior_loss_weight="0.5", repeats="3")
    objective, sources = loaded.run.objective, loaded.run.data.sources
    assert isinstance(objective, DreamBooth)
    assert (objective.prior_weight, objective.class_prompt) == (0.5, None)
    assert [(Path(s.path).name, s.trigger, s.repeats) for s in sources[:3]] == [
        ("one", "photo of sks dog", 3),
        ("train", "photo of ohwx man", 3),
        ("two", "photo of zwx dog", 3),
    ]
    assert [s.role for s in sources] == ["instance"] * 3 + ["prior"] * 2, "two dogs share a class"
    drawn = [(one.path.name, one.prompt, one.count) for one in class_images.folders(loaded.run)]
    assert drawn == [("dogs", "photo of a dog", 20), ("men", "photo of a man", 50)]
    assert loaded.origins["data.sources.4.class_images"] == f"{tmp_path}/concepts.json:5"
    assert [f for f in advice.check(loaded.run).errors if f.key.startswith(("data", "objective"))] == []


def test_a_list_of_concepts_without_prior_preservation(tmp_path: Path) -> None:
    loaded = listed(tmp_path, instance_prompt="a thing", num_class_images="20")
    assert type(loaded.run.objective) is Denoise
    assert len(loaded.run.data.sources) == 3
    ignored = notes(loaded, "ignored")
    assert ignored["instance_prompt"] == "concepts_list says it of each concept"
    assert ignored["num_class_images"].endswith("with_prior_preservation turns it on")
    assert ignored["concepts.json: 0.class_prompt"].endswith("with_prior_preservation turns it on")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (CONCEPTS.replace("num_class_images", "num_class_image"), "concepts.json:5: unknown key 1.num_class_image"),
        (CONCEPTS.replace('"instance_data_dir": "two", ', ""), "concepts.json:6: instance_data_dir is missing"),
        (CONCEPTS.replace('"class_data_dir": "men", ', ""), "this concept has no class_data_dir"),
        (CONCEPTS.replace('"men"', '"dogs"'), "holds the class images of 'photo of a dog' already"),
        ("{}", "this is no list of concepts"),
        ("[1, 2]", "this is no list of concepts"),
        ("[{]", "concepts.json"),
    ],
)
def test_a_list_of_concepts_that_will_not_do(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        listed(tmp_path, text, with_prior_preservation=True)
    problems = caught.value.problems if isinstance(caught.value, Problems) else [caught.value]
    told = "\n".join(f"{problem.where}: {problem.what}" for problem in problems)
    assert words in told, told


def test_rules_about_prior_sources(tmp_path: Path) -> None:
    def errors(objective: str, *roles: str) -> str:
        sources = "".join(f"    - {{path: p{i}, role: {role}}}\n" for i, role in enumerate(roles))
        for i in range(len(roles)):
            (tmp_path / f"p{i}").mkdir(exist_ok=True)
        text = f"data:\n  sources:\n{sources}objective: {objective}\ntraining: {{steps: 5}}\n"
        found = advice.check(files.load_text(text, folder=tmp_path).run).errors
        return "\n".join(error.what for error in found if error.key.startswith(("data", "objective")))

    assert "mean nothing to objective denoise" in errors("{type: denoise}", "instance", "prior")
    assert "no source has role: prior" in errors("{type: dreambooth}", "instance")
    assert "takes no prior images" in errors("{type: dreambooth, prior: model, class_prompt: x}", "instance", "prior")
    assert "not clear which" in errors("{type: dreambooth, class_prompt: x}", "instance", "prior", "prior")
    assert "nothing is taught" in errors("{type: dreambooth}", "prior")
    assert errors("{type: dreambooth}", "instance", "prior") == ""
    assert errors("{type: dreambooth, prior: model, class_prompt: x}", "instance") == ""
