"""Dataset files and options of sd-scripts: every key is taken, refused or reported, with its line."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from gesso.config import dialects, document, files
from gesso.config.dialects import Converted, DialectReport, kohya, toml
from gesso.config.files import Loaded
from gesso.errors import Problems, UserError

DATASET = """\
[general]
enable_bucket = true
caption_extension = ".txt"
keep_tokens = 1

[[datasets]]
resolution = 1024
batch_size = 2

  [[datasets.subsets]]
  image_dir = "{root}/hare"
  num_repeats = 10
  keep_tokens = 2

  [[datasets.subsets]]
  image_dir = "{root}/dogs"
  is_reg = true
  class_tokens = "a dog"
"""

# Every key of a dataset file, with a value that asks for something, and what becomes of it: our key and value, a word
# of the reason why it has no effect (!), or of the refusal (?).
LEVELS = {
    "resolution": ("768", "data.resolution=768"),
    "batch_size": ("3", "training.batch_size=3"),
    "enable_bucket": ("true", "data.buckets.enabled=True"),
    "min_bucket_reso": ("320", "data.buckets.smallest=320"),
    "max_bucket_reso": ("1536", "data.buckets.largest=1536"),
    "bucket_reso_steps": ("32", "data.buckets.step=32"),
    "bucket_no_upscale": ("true", "data.buckets.upscale=False"),
    "network_multiplier": ("0.5", "?one strength"),
    "validation_split": ("0.1", "data.validation.fraction=0.1"),
    "validation_seed": ("4", "!held out by their content"),
    "resize_interpolation": ('"area"', "?Lanczos"),
    "num_repeats": ("3", "data.sources.0.repeats=3"),
    "shuffle_caption": ("true", "data.captions.shuffle=True"),
    "keep_tokens": ("2", "data.captions.keep=2"),
    "keep_tokens_separator": ('"|||"', "data.captions.keep_separator=|||"),
    "secondary_separator": ('";;;"', "?second separator"),
    "caption_separator": ('";"', "data.captions.separator=;"),
    "caption_prefix": ('"photo of"', "data.captions.prefix=photo of "),
    "caption_suffix": ('"sharp"', "data.captions.suffix= sharp"),
    "enable_wildcard": ("true", "data.captions.wildcards=True"),
    "color_aug": ("true", "?colours"),
    "flip_aug": ("true", "data.sources.0.flip=True"),
    "face_crop_aug_range": ("[2.0, 4.0]", "?faces"),
    "random_crop": ("true", "data.sources.0.crop=random"),
    "caption_dropout_rate": ("0.1", "data.captions.dropout=0.1"),
    "caption_dropout_every_n_epochs": ("2", "?at random"),
    "caption_tag_dropout_rate": ("0.2", "data.captions.tag_dropout=0.2"),
    "token_warmup_min": ("2", "!token_warmup_step"),
    "token_warmup_step": ("10", "?grow"),
    "caption_extension": ('".cap"', "data.sources.0.caption_extension=.cap"),
    "cache_info": ("true", "!always kept"),
}
SUBSET = {
    "image_dir": ('"/pictures"', "data.sources.0.path=/pictures"),
    "is_reg": ("true", "data.sources.0.role=prior"),
    "class_tokens": ('"a hare"', "data.sources.0.concept=a hare"),
    "alpha_mask": ("true", "data.sources.0.mask=alpha"),
    "metadata_file": ('"meta.json"', "?metadata.jsonl"),
    "conditioning_data_dir": ('"edges"', "?ControlNet"),
    "custom_attributes": ("{}", "!notes"),
}

OPTIONS = {
    "pretrained_model_name_or_path": ('"a/b"', "model.base=a/b"),
    "vae": ('"a/vae"', "model.vae=a/vae"),
    "output_dir": ('"out"', "output=out"),
    "output_name": ('"my lora"', "name=my lora"),
    "network_module": ('"networks.lora"', "adapter.type=lora"),
    "network_dim": ("32", "adapter.rank=32"),
    "network_alpha": ("16", "adapter.alpha=16"),
    "network_args": ('["conv_dim=16", "conv_alpha=8"]', "?convolutions"),
    "network_dropout": ("0.1", "adapter.dropout=0.1"),
    "network_train_unet_only": ("true", "adapter.train_text_encoders=False"),
    "unet_lr": ("2e-4", "training.learning_rate=0.0002"),
    "text_encoder_lr": ("[1e-5, 0]", "training.text_encoder_learning_rates=[1e-05, 0]"),
    "learning_rate": ("1e-4", "training.learning_rate=0.0001"),
    "optimizer_type": ('"AdamW8bit"', "training.optimizer.type=adamw8bit"),
    "optimizer_args": ('["weight_decay=0.1", "betas=0.9,0.99"]', "training.optimizer.beta2=0.99"),
    "lr_scheduler": ('"cosine"', "training.schedule.type=cosine"),
    "max_train_steps": ("500", "training.steps=500"),
    "max_train_epochs": ("7", "training.epochs=7"),
    "mixed_precision": ('"bf16"', "training.precision=bf16"),
    "save_precision": ('"fp16"', "!float32"),
    "gradient_checkpointing": ("true", "training.gradient_checkpointing=True"),
    "gradient_accumulation_steps": ("4", "training.accumulation=4"),
    "cache_latents": ("true", "!always cached"),
    "cache_latents_to_disk": ("true", "!always cached"),
    "cache_text_encoder_outputs": ("true", "adapter.train_text_encoders=False"),
    "min_snr_gamma": ("5", "objective.min_snr_gamma=5"),
    "noise_offset": ("0.05", "objective.noise_offset=0.05"),
    "ip_noise_gamma": ("0.1", "objective.input_perturbation=0.1"),
    "max_timestep": ("900", "objective.timestep_high=0.9"),
    "max_grad_norm": ("0", "training.clip=None"),
    "max_token_length": ("225", "model.max_chunks=3"),
    "loss_type": ('"l1"', "objective.loss_type=l1"),
    "seed": ("42", "seed=42"),
    "save_every_n_steps": ("100", "checkpoint.every=100"),
    "save_every_n_epochs": ("1", "!optimiser steps"),
    "sample_every_n_steps": ("100", "preview.every=100"),
    "xformers": ("true", "training.attention=xformers"),
    "v_parameterization": ("true", "model.prediction=v_prediction"),
    "full_bf16": ("true", "?always float32"),
    "network_weights": ('"x.safetensors"', "?another LoRA"),
    "huggingface_token": ('"hf_x"', "?token"),
}


def load(text: str, tmp_path: Path, *, name: str = "train.toml") -> Loaded:
    path = tmp_path / name
    path.write_text(text)
    return files.load(path)


def lines_of(error: UserError) -> list[str]:
    found = error.problems if isinstance(error, Problems) else (error,)
    return [" ".join(" ".join(problem.lines()).split()) for problem in found]


def problems(text: str, tmp_path: Path, *, name: str = "train.toml") -> list[str]:
    with pytest.raises(UserError) as caught:
        load(text, tmp_path, name=name)
    return [line.replace(f"{tmp_path}/", "") for line in lines_of(caught.value)]


def read(text: str, tmp_path: Path) -> Converted:
    (tmp_path / "dataset.toml").write_text(text)
    return kohya.read(tmp_path / "dataset.toml")


def notes(report: DialectReport) -> dict[str, str]:
    return {e.key: e.note for part in (report.mapped, report.ignored, report.refused) for e in part}


def at(data: object, path: str) -> object:
    for part in path.split("."):
        data = data[int(part)] if isinstance(data, list) else data[part]  # type: ignore[index]
    return data


def judge(converted: Converted, key: str, line: int, expected: str) -> None:
    """The key has become what was expected, and the report names it with its line."""
    report = converted.report
    if expected[0] in "?!":
        entries = report.refused if expected[0] == "?" else report.ignored
        assert any(e.key.startswith(key) and expected[1:] in e.note + str(lines_of_all(converted)) for e in entries)
    else:
        native, _, value = expected.partition("=")
        assert str(at(converted.data, native)) == value
        entries = report.mapped
    assert any(e.key.startswith(key) and e.line == line for e in entries), (key, line, entries)


def lines_of_all(converted: Converted) -> list[str]:
    return [line for problem in converted.problems for line in lines_of(problem)]


def test_the_tables_name_every_key() -> None:
    assert set(LEVELS) == set(kohya.ANYWHERE)
    assert set(SUBSET) == set(kohya.OWN)


@pytest.mark.parametrize("level", ["general", "datasets", "subsets"])
@pytest.mark.parametrize("key", [*LEVELS, *SUBSET])
def test_every_key_of_a_dataset_file(key: str, level: str, tmp_path: Path) -> None:
    value, expected = (LEVELS | SUBSET)[key]
    # On its own the bucket keys do nothing, because buckets are off.
    rest = "enable_bucket = true\n" if "bucket" in key and key != "enable_bucket" else "\n"
    line = f"{key} = {value}\n"
    text = f"[general]\n{rest}{line if level == 'general' else chr(10)}"
    text += f"[[datasets]]\n{line if level == 'datasets' else chr(10)}"
    folder = "" if key == "image_dir" else 'image_dir = "/other"\n'
    text += f"[[datasets.subsets]]\n{line if level == 'subsets' else chr(10)}{folder}"
    number = {"general": 3, "datasets": 5, "subsets": 7}[level]
    path = {"general": "general", "datasets": "datasets.0", "subsets": "datasets.0.subsets.0"}[level]
    converted = read(text, tmp_path)
    if (key in SUBSET and level != "subsets") or (key in kohya.DATASET and level == "subsets"):
        where = "one subset" if key in SUBSET else "the data set"
        assert any(f"dataset.toml:{number}: {key} belongs to {where}" in p for p in lines_of_all(converted))
    else:
        judge(converted, f"{path}.{key}", number, expected)
        assert bool(converted.problems) == (expected[0] == "?")


def test_nearest_level_wins_and_what_nobody_takes_is_said(tmp_path: Path) -> None:
    text = DATASET.replace("{root}", "/r").replace('class_tokens = "a dog"', "keep_tokens = 3")
    converted = read(text, tmp_path)
    sources = converted.data["data"]["sources"]
    assert [one["captions"]["keep"] for one in sources] == [2, 3]
    assert notes(converted.report)["general.keep_tokens"] == "what is nearer to the images says otherwise"
    assert not converted.problems


def test_a_run_file_with_a_dataset_file(tmp_path: Path) -> None:
    (tmp_path / "hare").mkdir()
    (tmp_path / "hare" / "a.png").write_bytes(b"")
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets" / "dataset.toml").write_text(DATASET.replace("{root}", str(tmp_path)))
    text = "preset: low_vram\ndata: sets/dataset.toml\ntraining:\n  steps: 10\n"
    loaded = load(text, tmp_path, name="run.yaml")
    run, report = loaded.run, loaded.report
    hare, dogs = run.data.sources
    assert (hare.path, hare.layout, hare.repeats) == (str(tmp_path / "hare"), "folder", 10)
    assert (hare.missing_captions, hare.caption_extension, hare.role) == ("error", ".txt", "instance")
    assert (dogs.role, dogs.concept, dogs.missing_captions, dogs.repeats) == ("prior", "a dog", "concept", 1)
    assert hare.captions is not None
    assert dogs.captions is not None
    assert (hare.captions.keep, dogs.captions.keep) == (2, 1)
    assert (hare.captions.lines, run.data.resolution, run.training.batch_size) == ("first", 1024, 2)
    buckets = run.data.buckets
    assert (buckets.enabled, buckets.smallest, buckets.largest, buckets.step) == (True, 256, 1024, 64)
    assert loaded.origins["data.sources.0.repeats"] == f"{tmp_path}/sets/dataset.toml:12"
    assert loaded.origins["training.batch_size"] == f"{tmp_path}/sets/dataset.toml:8"
    assert report is not None
    assert report.tool == kohya.NAME
    assert files.load_text(files.dump(run), folder=tmp_path).run == run.model_copy(
        update={"output": run.folder.absolute()}
    )


def test_a_dataset_file_named_by_a_run_file_that_says_otherwise(tmp_path: Path) -> None:
    (tmp_path / "dataset.toml").write_text(DATASET)
    text = "data: dataset.toml\ntraining:\n  steps: 10\n  batch_size: 4\n"
    (found,) = problems(text, tmp_path, name="run.yaml")
    assert found == "run.yaml:4: training.batch_size is 2 in dataset.toml:8, and not the same here -> keep one of them"
    (found,) = problems("training: {steps: 1}\ndata: datset.toml\n", tmp_path, name="run.yaml")
    assert found.startswith("run.yaml:2: data: there is no file datset.toml")


def test_a_dataset_file_alone_is_not_a_run(tmp_path: Path) -> None:
    found = problems(DATASET, tmp_path, name="dataset.toml")
    assert found == [
        "dataset.toml: this file only describes images, not a run -> write a run file with `data: dataset.toml` in it"
    ]


def test_json_is_read_too(tmp_path: Path) -> None:
    (tmp_path / "set.json").write_text(
        '{"datasets": [\n{"resolution": 512,\n"subsets": [\t{"image_dir": "/x",\n\t"num_repeets": 2}]}]}'
    )
    converted = kohya.read(tmp_path / "set.json")
    assert at(converted.data, "data.sources.0.path") == "/x"
    (found,) = lines_of_all(converted)
    assert found.replace(f"{tmp_path}/", "").startswith("set.json:4: unknown key datasets.0.subsets.0.num_repeets")
    assert "did you mean num_repeats?" in found


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[generall]\n", "dataset.toml:1: unknown key generall"),
        (
            "[[datasets]]\nresolutoin = 3\n[[datasets.subsets]]\nimage_dir='/x'",
            "dataset.toml:2: unknown key datasets.0.re",
        ),
        ("[[datasets]]\n[[datasets.subsets]]\nnum_repeats=1\n", "dataset.toml:2: image_dir is missing"),
        ("[general]\nkeep_tokens=1\n", "dataset.toml: no training images are named"),
        ("datasets = 3\n", "dataset.toml:1: datasets must be a list of tables"),
        ("[[datasets]]\nresolution=[512,768]\n[[datasets.subsets]]\nimage_dir='/x'", "512 x 768 is no square"),
        ("[[datasets]]\nresolution='big'\n[[datasets.subsets]]\nimage_dir='/x'", "must be one whole number, or width"),
        ("[[datasets]]\n[[datasets.subsets]]\nimage_dir='/x'\nflip_aug='maybe'", "flip_aug must be true or false"),
    ],
)
def test_mistakes_have_their_line(text: str, words: str, tmp_path: Path) -> None:
    found = [line.replace(f"{tmp_path}/", "") for line in lines_of_all(read(text, tmp_path))]
    assert any(words in one for one in found), found


def test_wrong_values_are_named_in_the_words_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "dataset.toml").write_text(DATASET.replace("num_repeats = 10", 'num_repeats = "many"'))
    (found,) = problems("data: dataset.toml\ntraining: {steps: 1}\n", tmp_path, name="run.yaml")
    assert found.startswith("dataset.toml:12: datasets.0.subsets.0.num_repeats must be a number, not 'many'")


def test_toml_mistakes_have_their_line(tmp_path: Path) -> None:
    for text, line in (("a = 1\nb = tru\n", 2), ("a = 1\na = 2\n", 2), ('x = "abc', 1), ("", None)):
        with pytest.raises(UserError) as caught:
            read(text, tmp_path)
        assert caught.value.where == f"{tmp_path}/dataset.toml" + (f":{line}" if line else "")
    # An image_dir that is missing is one problem, not two.
    (tmp_path / "dataset.toml").write_text("[[datasets]]\n[[datasets.subsets]]\nnum_repeats = 2\n")
    assert len(problems("data: dataset.toml\ntraining: {steps: 1}\n", tmp_path, name="run.yaml")) == 1
    with pytest.raises(UserError, match="there is no such dataset file"):
        kohya.read(tmp_path / "none.toml")


def test_lines_of_toml() -> None:
    text = """\
# [comment]
[general]  # x = [
a."b c" = '''x
[not a header]'''
[[datasets]]
r = [
  1, # one ]
  2,
]
[[datasets.subsets]]
s = "q\\"] #"
[[datasets.subsets]]
t = { u = 1, v = [ { w = 2 } ] }
[[datasets]]
subsets = [{ x = 1 },
  { x = 2 }]
"""
    parsed = toml.parse(text, file="f")
    assert parsed.data == tomllib.loads(text)
    lines = parsed.lines
    assert lines["general", "a", "b c"] == 3
    assert (lines["datasets", 0, "r"], lines["datasets", 0, "r", 1]) == (6, 8)
    assert lines["datasets", 0, "subsets", 0, "s"] == 11
    assert lines["datasets", 0, "subsets", 1, "t", "v", 0, "w"] == 13
    assert lines["datasets", 1, "subsets", 1, "x"] == 16


def test_one_folder_at_several_resolutions_is_one_source(tmp_path: Path) -> None:
    one = "[[datasets]]\nresolution = {}\n[[datasets.subsets]]\nimage_dir = '/x'\n"
    converted = read(one.format(512) + one.format(1024), tmp_path)
    (source,) = converted.data["data"]["sources"]
    assert source["resolution"] == [512, 1024]
    assert {e.line for e in converted.report.mapped if e.key.endswith(".resolution")} == {2, 6}
    converted = read(one.format(512) + one.format(1024).replace("/x", "/y"), tmp_path)
    assert [s["resolution"] for s in converted.data["data"]["sources"]] == [512, 1024]
    assert converted.data["data"]["resolution"] == 1024
    assert at(read(one.format("[512, 2048]"), tmp_path).data, "data.resolution") == 1024, "the area counts"


def test_data_sets_that_differ_where_one_value_counts(tmp_path: Path) -> None:
    one = "[[datasets]]\nbatch_size = {}\n[[datasets.subsets]]\nimage_dir = '/x'\n"
    (found,) = lines_of_all(read(one.format(1) + one.format(2).replace("/x", "/y"), tmp_path))
    assert "dataset.toml:6: datasets.1.batch_size is 2 but datasets.0.batch_size (line 2) is 1" in found
    (found,) = lines_of_all(read(one.format(2) + "[[datasets]]\n[[datasets.subsets]]\nimage_dir = '/y'\n", tmp_path))
    assert "datasets.0.batch_size is for some of the data sets" in found


def test_what_several_subsets_share_is_one_problem(tmp_path: Path) -> None:
    text = DATASET.replace("{root}", "/r").replace("keep_tokens = 1", "color_aug = true\nflip_aug = 3")
    assert len(lines_of_all(read(text, tmp_path))) == 2


def test_images_that_sd_scripts_would_not_see(tmp_path: Path) -> None:
    (tmp_path / "hare" / "old").mkdir(parents=True)
    (tmp_path / "hare" / "old" / "a.png").write_bytes(b"")
    found = lines_of_all(read(DATASET.replace("{root}", str(tmp_path)), tmp_path))
    assert len(found) == 1
    assert "has images in folders inside, such as old/a.png" in found[0]


def test_captions_of_sd_scripts(tmp_path: Path) -> None:
    one = "[[datasets]]\n[[datasets.subsets]]\nimage_dir = '/x'\n"
    assert at(read(one, tmp_path).data, "data.captions.lines") == "first"
    assert at(read(one, tmp_path).data, "data.sources.0.caption_extension") == ".caption"
    assert at(read(one + "enable_wildcard = true\n", tmp_path).data, "data.captions.lines") == "choose"
    both = read(one + "keep_tokens = 1\nkeep_tokens_separator = '|||'\n", tmp_path)
    assert both.data["data"]["captions"] == {"keep_separator": "|||", "lines": "first"}
    assert "says what is kept" in notes(both.report)["datasets.0.subsets.0.keep_tokens"]
    empty = read(one + "keep_tokens = 1\nkeep_tokens_separator = ''\n", tmp_path)
    assert empty.data["data"]["captions"]["keep"] == 1


# Options


BARE = 'pretrained_model_name_or_path = "a/b"\nnetwork_module = "networks.lora"\nresolution = "1024,1024"\n'


def without(key: str, text: str) -> str:
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith(f"{key} "))


@pytest.mark.parametrize("key", OPTIONS)
def test_core_options(key: str, tmp_path: Path) -> None:
    value, expected = OPTIONS[key]
    text = f"{key} = {value}\n" + without(key, BARE + 'train_data_dir = "/x"\n')
    converted = dialects.convert("options of sd-scripts", toml.parse(text, file="t.toml"), folder=tmp_path)
    judge(converted, key, 1, expected)
    assert bool(converted.problems) == (expected[0] == "?"), lines_of_all(converted)


@pytest.mark.parametrize("key", LEVELS)
def test_options_of_images_mean_what_they_mean_in_a_dataset_file(key: str, tmp_path: Path) -> None:
    value, expected = LEVELS[key]
    name = "train_batch_size" if key == "batch_size" else key
    text = f"{name} = {value}\n" + without(key, BARE + 'train_data_dir = "/x"\n')
    text += "enable_bucket = true\n" if "bucket" in key and key != "enable_bucket" else ""
    converted = dialects.convert("options of sd-scripts", toml.parse(text, file="t.toml"), folder=tmp_path)
    judge(converted, name, 1, expected)


def test_every_option_is_read_by_itself(tmp_path: Path) -> None:
    """Whatever option a file has, it is in the report, or among the problems with its line."""
    from gesso.config.dialects.kohya_tables import KEYS

    for key in KEYS:
        text = f"{key} = 1\n" + without(key, BARE + 'train_data_dir = "/x"\n')
        converted = dialects.convert("options of sd-scripts", toml.parse(text, file="t.toml"), folder=tmp_path)
        seen = {e.key.split(".")[0] for e in (*converted.report.mapped, *converted.report.ignored)}
        refused = {e.key.split(".")[0] for e in converted.report.refused}
        assert key in seen | refused or any("t.toml:1" in p for p in lines_of_all(converted)), key


def test_a_whole_file_of_options(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text(
        "# first\nsks hare --n blurry --w 768 --h 512 --d 7 --s 30 --l 6.5\na dog --n blurry --d 8\n"
    )
    text = f"""\
[model]
pretrained_model_name_or_path = "a/b"
[data]
train_data_dir = "{tmp_path}/img"
reg_data_dir = "{tmp_path}/reg"
prior_loss_weight = 0.5
resolution = "1024"
caption_extension = ".txt"
shuffle_caption = true
keep_tokens = 1
[training]
train_batch_size = 2
max_train_steps = 900
max_train_epochs = 10
lr_scheduler = "cosine_with_restarts"
lr_scheduler_num_cycles = 3
lr_warmup_steps = 0.05
unet_lr = 1e-4
text_encoder_lr = 5e-5
[saving]
output_dir = "out"
output_name = "hare"
save_every_n_steps = 200
save_last_n_steps = 600
sample_prompts = "{tmp_path}/prompts.txt"
log_with = "wandb"
"""
    loaded = load(text, tmp_path)
    run = loaded.run
    train, prior = run.data.sources
    assert (train.path, train.layout, train.missing_captions) == (f"{tmp_path}/img", "kohya", "concept")
    assert (prior.path, prior.layout, prior.role, prior.weight) == (f"{tmp_path}/reg", "kohya", "prior", 0.5)
    assert (run.data.captions.shuffle, run.data.captions.keep, run.data.buckets.enabled) == (True, 1, False)
    assert (run.training.steps, run.training.epochs, run.training.batch_size) == (None, 10, 2)
    assert (run.training.schedule.cycles, run.training.schedule.warmup) == (3, 0.05)
    assert (run.training.learning_rate, run.training.text_encoder_learning_rates) == (1e-4, (5e-5,))
    assert (run.adapter.rank, run.adapter.alpha, run.adapter.targets) == (4, 1, "attention-mlp")
    assert run.adapter.train_text_encoders
    assert (run.name, str(run.output)) == ("hare", "out/hare")
    assert (run.checkpoint.every, run.checkpoint.keep_last, run.checkpoint.keep_every) == (200, 3, None)
    preview = run.preview
    assert preview.prompts == ("sks hare", "a dog")
    assert (preview.negative, preview.width, preview.height, preview.seed) == ("blurry", 768, 512, 7)
    assert (preview.inference_steps, preview.guidance, run.training.precision) == (30, 6.5, "fp32")
    assert loaded.report is not None
    said = notes(loaded.report)
    assert said["training.max_train_steps"] == "training.max_train_epochs wins over it, as in sd-scripts"
    assert {f"{s}.{k}" for s, keys in tomllib.loads(text).items() for k in keys} <= set(said)


def test_options_with_a_dataset_file(tmp_path: Path) -> None:
    (tmp_path / "dataset.toml").write_text(DATASET.replace("{root}", str(tmp_path)))
    text = (
        BARE + 'dataset_config = "dataset.toml"\ntrain_data_dir = "/x"\ntrain_batch_size = 5\nshuffle_caption = true\n'
    )
    loaded = load(text, tmp_path)
    assert [source.path for source in loaded.run.data.sources] == [f"{tmp_path}/hare", f"{tmp_path}/dogs"]
    assert loaded.run.training.batch_size == 2, "the dataset file overrules the options"
    assert all(source.captions is not None and source.captions.shuffle for source in loaded.run.data.sources)
    assert loaded.report is not None
    said = notes(loaded.report)
    assert said["train_data_dir"] == "dataset_config says what the images are"
    assert said["train_batch_size"] == "what is nearer to the images says otherwise"
    assert said["dataset.toml: datasets.0.batch_size"] == "training.batch_size"
    assert loaded.origins["data.sources.0.repeats"] == f"{tmp_path}/dataset.toml:12"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            "lerning_rate = 1",
            "train.toml:1: unknown key lerning_rate (read as options of sd-scripts) -> did you mean le",
        ),
        ('network_module = "lycoris.kohya"', "of the networks of sd-scripts only networks.lora is there"),
        ('network_args = ["conv_dmi=3"]', "unknown key network_args.conv_dmi"),
        ('network_args = ["conv_dim=3"]', "network_args.conv_dim: '3': adapters of 3 x 3 convolutions"),
        ('optimizer_type = "Prodigy"', "optimizer_type: 'Prodigy': this optimizer comes in a later version"),
        ('optimizer_args = ["d_coef=2"]', "optimizer_args.d_coef: '2': the optimizers here have no such setting"),
        ("v2 = true", "this is for Stable Diffusion 2"),
        ('sample_prompts = "none.txt"', "none.txt cannot be read (FileNotFoundError)"),
        ('sample_prompts = "p.toml"', ".toml files of prompts are not read"),
        ('loss_type = "huber"', "a huber loss whose delta follows the timestep"),
        ('in_json = "meta.json"', "a JSON file of captions is not read -> write it as metadata.jsonl"),
    ],
)
def test_what_options_cannot_be(line: str, words: str, tmp_path: Path) -> None:
    key = line.split()[0]
    (found,) = problems(f"{line}\n" + without(key, BARE + 'train_data_dir = "/x"\nnetwork_dim = 4\n'), tmp_path)
    assert words in found


@pytest.mark.parametrize(
    ("lines", "rate", "text", "trained"),
    [
        ("learning_rate = 1e-4", 1e-4, None, True),
        ("unet_lr = 1e-4", 1e-4, (2e-6,), True),
        ("learning_rate = 3e-5\nunet_lr = 1e-4", 1e-4, (3e-5,), True),
        ("unet_lr = 1e-4\ntext_encoder_lr = [1e-5, 0]", 1e-4, (1e-5, 0), True),
        ("learning_rate = 3e-5\nunet_lr = 1e-4\nnetwork_train_unet_only = true", 1e-4, None, False),
        ("network_dim = 4", 2e-6, None, True),
    ],
)
def test_learning_rates(lines: str, rate: float, text: tuple[float, ...] | None, trained: bool, tmp_path: Path) -> None:
    run = load(f'{BARE}train_data_dir = "/x"\n{lines}\n', tmp_path).run
    assert (run.training.learning_rate, run.training.text_encoder_learning_rates) == (rate, text)
    assert run.adapter.train_text_encoders is trained


def test_options_without_images_or_resolution(tmp_path: Path) -> None:
    found = problems("network_dim = 4\n", tmp_path)
    assert found == [
        "train.toml: no training images are named -> add train_data_dir (with folders such as 10_sks aldar inside) or "
        "dataset_config",
        "train.toml: resolution is missing, and sd-scripts has no default -> write resolution = 1024",
    ]


GUIDE = """\
model:
  pretrained_model_name_or_path: "/workspace/models/stable-diffusion-xl-base-1.0"
  v2: true
  sdxl: true
training:
  resolution: 1024
  batch_size: 1
  gradient_accumulation_steps: 1
  learning_rate: 1e-4
  max_train_steps: 1500
  save_every_n_steps: 150
network:
  network_type: "lora"
  network_dim: 64
  network_alpha: 64
dataset:
  enable_bucket: true
  min_bucket_reso: 512
  max_bucket_reso: 1024
"""
IMAGES = "  train_data_dir: /workspace/datasets/images\n"


def test_the_guide_as_it_stands_lacks_only_its_images(tmp_path: Path) -> None:
    (found,) = problems(GUIDE, tmp_path, name="guide.yaml")
    assert "no training images are named" in found
    run = load(GUIDE + IMAGES, tmp_path, name="guide.yaml").run
    assert (run.adapter.rank, run.adapter.alpha, run.training.steps, run.checkpoint.every) == (64, 64, 1500, 150)
    assert (run.data.buckets.enabled, run.data.buckets.smallest, run.data.buckets.largest) == (True, 512, 1024)


@pytest.mark.parametrize(
    ("fragment", "native", "value"),
    [
        ("dataset:\n  resolution: [512, 768, 1024, 1280]\n  enable_bucket: true\n  bucket_reso_steps: 64\n",
         "data.sources.0.resolution", (512, 768, 1024, 1280)),
        ("training:\n  resolution: 1536\n  batch_size: 1\n  gradient_checkpointing: true\n"
         "dataset:\n  min_bucket_reso: 1024\n  max_bucket_reso: 1536\n", "data.resolution", 1536),
        ("training:\n  learning_rate: 5e-5\n  max_train_steps: 2000\nnetwork:\n  network_dim: 128\n"
         "  network_alpha: 64\ndataset:\n  resolution: [512, 768, 1024]\n", "adapter.rank", 128),
        ("training:\n  learning_rate: 1e-4\n  max_train_steps: 1500\nnetwork:\n  network_dim: 32\n"
         "  network_alpha: 32\ndataset:\n  resolution: 1024\n  enable_bucket: false\n", "data.buckets.enabled", False),
        ("steps: 100\nlearning_rate: 1e-4\nnetwork_dim: 16\n", "training.steps", 100),
    ],
)  # fmt: skip
def test_fragments_of_the_guide(fragment: str, native: str, value: object, tmp_path: Path) -> None:
    data = document.parse(GUIDE + IMAGES, file="x").data
    new = document.parse(fragment, file="x").data
    flat = {key for section, inner in new.items() for key in (inner if isinstance(inner, dict) else [section])}
    flat |= {"max_train_steps"} if "steps" in flat else set()
    for inner in data.values():
        for key in flat & set(inner):
            del inner[key]
    for section, inner in new.items():
        data.setdefault(section, {}).update(inner) if isinstance(inner, dict) else data.__setitem__(section, inner)
    loaded = load(document.emit(data), tmp_path, name="guide.yaml")
    found = at(loaded.run.model_dump(mode="json"), native)
    assert found == (list(value) if isinstance(value, tuple) else value)


def test_the_example_of_options() -> None:
    loaded = files.load(Path(__file__).parents[3] / "examples" / "from_sd_scripts.toml")
    run = loaded.run
    assert [(source.role, source.repeats) for source in run.data.sources] == [("instance", 10), ("prior", 1)]
    assert (run.training.batch_size, run.training.steps, run.adapter.alpha) == (2, 1000, 8)
    assert not run.data.buckets.upscale
