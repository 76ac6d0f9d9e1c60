from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gesso.adapters import Full, LoRA
from gesso.config import files, presets
from gesso.config.run import RunConfig
from gesso.errors import Problems, UserError

MINIMAL = "data:\n  sources:\n    - path: images\ntraining:\n  steps: 10\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, "utf-8")
    return path


def problems(text: str, *sets: str) -> list[str]:
    """Every problem of a file as its lines, joined."""
    with pytest.raises(UserError) as caught:
        files.load_text(text, folder=Path("/data"), sets=sets)
    error = caught.value
    found = error.problems if isinstance(error, Problems) else (error,)
    return [" ".join(" ".join(problem.lines()).split()) for problem in found]


def test_values_and_their_origins(tmp_path: Path) -> None:
    path = write(tmp_path, "preset: character\n" + MINIMAL + "  learning_rate: 1e-4\n")
    loaded = files.load(path, sets=["adapter.rank=8", "preview.prompts=[a cat, a dog]"])
    assert loaded.run.training.learning_rate == 1e-4
    assert loaded.run.adapter.rank == 8
    assert loaded.run.preview.prompts == ("a cat", "a dog")
    assert loaded.run.training.accumulation == 4
    assert loaded.origins["training.learning_rate"] == f"{path}:7"
    assert loaded.origins["data.sources.0.path"] == f"{path}:4"
    assert loaded.origins["training.accumulation"] == "preset character"
    assert loaded.origins["adapter.rank"] == "--set"
    assert loaded.origins["preview.prompts"] == "--set"
    assert loaded.origins["adapter.dropout"] == "default"
    assert loaded.report is None


def test_every_value_has_an_origin(tmp_path: Path) -> None:
    loaded = files.load(write(tmp_path, MINIMAL))

    def leaves(value: Any, path: str) -> list[str]:
        if isinstance(value, dict):
            return [leaf for key, item in value.items() for leaf in leaves(item, f"{path}{key}.")]
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return [leaf for i, item in enumerate(value) for leaf in leaves(item, f"{path}{i}.")]
        return [path.rstrip(".")]

    assert sorted(loaded.origins) == sorted(leaves(loaded.run.model_dump(mode="json"), ""))


def test_the_file_wins_over_the_preset_and_keeps_its_other_values() -> None:
    text = "preset: high_quality\n" + MINIMAL + "  schedule:\n    warmup: 0\n"
    run = files.load_text(text, folder=Path("/data")).run
    assert (run.training.schedule.type, run.training.schedule.warmup) == ("cosine", 0)
    assert run.training.steps == 10


def test_epochs_replace_the_steps_of_a_preset() -> None:
    text = "preset: character\n" + MINIMAL.replace("steps: 10", "epochs: 3")
    run = files.load_text(text, folder=Path("/data")).run
    assert (run.training.steps, run.training.epochs) == (None, 3)


def test_a_preset_can_be_chosen_by_set() -> None:
    run = files.load_text(MINIMAL, folder=Path("/data"), sets=["preset=style"]).run
    assert run.objective.min_snr_gamma == 5


def test_what_a_preset_says_of_another_adapter_falls_away() -> None:
    text = "preset: character\n" + MINIMAL + "adapter:\n  type: full\n"
    assert files.load_text(text, folder=Path("/data")).run.adapter == Full()
    assert files.load_text(text, folder=Path("/data"), sets=["adapter.type=lora"]).run.adapter == LoRA(rank=32)
    (mistake,) = problems(text, "adapter.rank=4")
    assert "--set adapter.rank=4: adapter.rank is only for type: lora" in mistake


def test_sets_reach_list_items_and_add_new_ones() -> None:
    sets = ["data.sources.0.repeats=3", "data.sources.1.path=/more", "trackers.0.type=wandb", "training.clip=null"]
    run = files.load_text(MINIMAL, folder=Path("/data"), sets=sets).run
    assert [(str(s.path), s.repeats) for s in run.data.sources] == [("/data/images", 3), ("/more", 1)]
    assert run.trackers[0].type == "wandb"
    assert run.training.clip is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("training.steps", "not of the form key=value"),
        ("=3", "not of the form key=value"),
        ("a..b=3", "not of the form key=value"),
        ("training.steps.x=3", "training.steps is a value and has no x"),
        ("data.sources.5.path=x", "data.sources is a list of 1 and has no 5"),
        ("training.step=3", "unknown key step in training -> did you mean steps or data.buckets.step?"),
        ("training.steps=ten", "--set training.steps=ten: training.steps must be a whole number, not 'ten'"),
        ("preset=charakter", "no preset 'charakter' -> did you mean character?"),
    ],
)
def test_bad_sets(text: str, words: str) -> None:
    (found,) = problems(MINIMAL, text)
    assert words in found


def test_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    (tmp_path / "my-model").mkdir()
    text = """\
output: results/one
model: {base: my-model, vae: ../vae, config: stabilityai/x}
data:
  sources: [{path: images}, {path: ../more}, {path: ~/home}, {path: /absolute}]
  validation: {path: held}
  cache: cache
training: {steps: 1}
"""
    run = files.load(write(tmp_path, text), sets=["data.cache=here"]).run
    parent = tmp_path.parent
    assert [str(s.path) for s in run.data.sources] == [
        *(f"{tmp_path}/images", f"{parent}/more", str(Path.home() / "home"), "/absolute"),
    ]
    assert str(run.data.validation.path) == f"{tmp_path}/held"
    assert str(run.data.cache) == "/here", "typed on the command line: relative to the working directory"
    assert run.model.base == f"{tmp_path}/my-model"
    assert run.model.vae == f"{parent}/vae"
    assert run.model.config == "stabilityai/x"
    assert str(run.output) == "results/one"
    assert "output: /results/one\n" in files.dump(run)


def test_a_hub_id_stays_one(tmp_path: Path) -> None:
    run = files.load(write(tmp_path, MINIMAL), sets=["model.base=stabilityai/sdxl-turbo"]).run
    assert run.model.base == "stabilityai/sdxl-turbo"


def test_all_problems_at_once_with_line_key_value_and_cure() -> None:
    text = """\
name: "-x"
data:
  sources:
    - path: images
      repeat: 2
      missing_captions: trigerr
  resolution: 1e3
training:
  steps: 400-500
  batch_size: 0
  learning_rat: 1e-4
  precision: fp8
  gradient_checkpointing: yes
  clip: "1.0"
  text_encoder_learning_rates: [1e-5, fast]
learning_rate: 1
train_batch_size: 2
adapter:
  targets: atention
  rank: true
preview:
  prompts: a cat
  width: 512
trackers:
  - type: wandbb
schedule: 3
"""
    found = problems(text)
    expected = [
        "run.yaml:1: name must start with a letter or digit",
        "run.yaml:5: unknown key repeat in data.sources.0 -> did you mean repeats?",
        "run.yaml:6: data.sources.0.missing_captions must be one of error, empty, trigger, concept, drop, "
        "not 'trigerr' "
        "-> did you mean trigger?",
        "run.yaml:9: training.steps must be a whole number, not '400-500' -> 400-500 is a range, not a value",
        "run.yaml:10: training.batch_size must be at least 1, not 0",
        "run.yaml:11: unknown key learning_rat in training -> did you mean learning_rate?",
        "run.yaml:12: training.precision must be one of fp32, bf16, fp16, not 'fp8'",
        "run.yaml:13: training.gradient_checkpointing must be true or false, not 'yes' -> write true",
        "run.yaml:14: training.clip must be a number, not '1.0' -> write 1.0 without quotes",
        "run.yaml:15: training.text_encoder_learning_rates.1 must be a number, not 'fast'",
        "run.yaml:16: unknown key learning_rate at the top level -> did you mean training.learning_rate?",
        "run.yaml:17: unknown key train_batch_size at the top level -> that is called training.batch_size here",
        "run.yaml:19: adapter.targets must be one of all, attention, attention-mlp, all-linear or a list, "
        "not 'atention' -> did you mean attention?",
        "run.yaml:20: adapter.rank must be a whole number, not true",
        "run.yaml:22: preview.prompts must be a list, not 'a cat' -> write a list: ['a cat']",
        "run.yaml:25: trackers.0.type must be one of tensorboard, wandb, not 'wandbb' -> did you mean wandb?",
        "run.yaml:26: unknown key schedule at the top level -> did you mean training.schedule?",
    ]
    assert len(found) == len(expected), "\n".join(found)
    for line, words in zip(found, expected, strict=True):
        assert words in line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("training: {steps: 3}", "data.sources is missing"),
        ("data: {sources: [{path: x}]}", "the run has no length"),
        ("data: {sources: [{path: x}]}\ntraining: {batch_size: 1}", "give the length of the run: steps or epochs"),
        ("data: {sources: []}\ntraining: {steps: 3}", "data.sources must have at least 1 item(s)"),
        ("data: {sources: [{repeats: 2}]}\ntraining: {steps: 3}", "data.sources.0.path is missing"),
        ("data: 3\ntraining: {steps: 3}", "data must be a section with keys of its own, not 3"),
        (MINIMAL + "name: 12", 'name must be text, not 12 -> put it in quotes: "12"'),
        (MINIMAL + "  learning_rate: .inf", "training.learning_rate must be a finite number"),
        (MINIMAL + "  learning_rate: .nan", "training.learning_rate must be a finite number"),
        (MINIMAL + "  batch_size: null", "give a value or leave the key out (default 1)"),
        (MINIMAL + "  Batch-Size: 2", "write batch_size"),
        (MINIMAL + "objective: {timestep_low: 0.9, timestep_high: 0.1}", "timestep_low must be below timestep_high"),
        (MINIMAL + "preset: carácter", "there is no preset"),
        (
            MINIMAL + "adapter: {type: ful}",
            "adapter.type must be one of lora, loha, lokr, oft, full, embedding, not 'ful' -> did you mean full?",
        ),
        (
            MINIMAL + "adapter: full",
            "adapter must be a section with keys of its own, not 'full' -> write {type: full}",
        ),
        (MINIMAL + "model: micro:sdxl", "write {base: micro:sdxl}"),
        ("data: {sources: [my photos]}\ntraining: {steps: 3}", "not 'my photos' -> write {path: my photos}"),
        (MINIMAL + "model: {fuse: [a.safetensors]}", "not 'a.safetensors' -> write {path: a.safetensors}"),
        (
            MINIMAL + "adapter: {type: full, rank: 4}",
            "adapter.rank is only for type: lora or loha or lokr -> leave it out, or write",
        ),
        (MINIMAL + "adapter: {rnk: 4}", "unknown key rnk in adapter -> did you mean rank?"),
    ],
)
def test_single_problems(text: str, words: str) -> None:
    (found,) = problems(text)
    assert words in found


def test_a_single_text_encoder_rate_serves_all() -> None:
    run = files.load_text(MINIMAL + "  text_encoder_learning_rates: 1e-5\n", folder=Path("/")).run
    assert run.training.text_encoder_learning_rates == (1e-5,)


RUNS = st.builds(
    lambda name, paths, text, rate, seed, targets, rates, trackers, fraction: RunConfig.model_validate(
        {
            "name": name,
            "output": "/runs/x",
            "seed": seed,
            "data": {
                "sources": [{"path": path, "concept": text} for path in paths],
                "validation": {"fraction": fraction},
            },
            "adapter": {"targets": targets},
            "training": {"steps": 3, "learning_rate": rate, "text_encoder_learning_rates": rates},
            "preview": {"prompts": [text], "negative": text},
            "trackers": trackers,
        }
    ),
    name=st.from_regex(r"[a-zé0-9_][a-zé0-9 .-]{0,8}", fullmatch=True),
    paths=st.lists(st.from_regex(r"/[^\x00/.~][^\x00/.]{0,8}", fullmatch=True), min_size=1, max_size=2),
    text=st.text(max_size=12),
    rate=st.floats(min_value=0, max_value=10),
    seed=st.integers(min_value=0),
    targets=st.sampled_from(["attention", "all-linear", ("to_q", "to_out.0")]),
    rates=st.none() | st.lists(st.floats(min_value=0, max_value=1), max_size=2).map(tuple),
    trackers=st.sampled_from([(), ({"type": "wandb", "entity": "me"}, {"type": "tensorboard"})]),
    fraction=st.floats(min_value=0, max_value=1, exclude_max=True),
)


@settings(max_examples=30, deadline=None)
@given(RUNS)
def test_dump_reads_back_to_an_equal_run(run: RunConfig) -> None:
    assert files.load_text(files.dump(run), folder=Path("/elsewhere")).run == run


def test_dump_writes_every_value(tmp_path: Path) -> None:
    loaded = files.load(write(tmp_path, MINIMAL))
    again = files.load(write(tmp_path, files.dump(loaded.run)))
    assert set(again.origins) == set(loaded.origins)
    assert not [key for key, origin in again.origins.items() if origin == "default"]
    assert again.run.output == Path(os.getcwd(), "runs", "run")


def test_a_new_run_file_loads_and_explains_itself(tmp_path: Path) -> None:
    data = tmp_path / "My Häse!"
    data.mkdir()
    path = tmp_path / "run.yaml"
    for preset in presets.names():
        files.write_new(path, data=data, preset=preset, trigger="sks: hare", force=True)
        run = files.load(path).run
        assert run.data.sources[0].path == str(data)
        assert run.data.sources[0].missing_captions == "trigger", "the folder has no captions"
        assert any("sks: hare" in prompt for prompt in run.preview.prompts)
        text = path.read_text("utf-8")
        assert 'path: "My Häse!"' in text
        assert "# Batches per optimiser step." in text or "accumulation" not in text
    (data / "a.txt").write_text("a hare")
    files.write_new(path, data=data, base="./model", force=True)
    loaded = files.load(path)
    assert loaded.run.model.base == str(tmp_path / "model")
    assert loaded.run.data.sources[0].missing_captions == "error"


def test_a_run_file_is_never_overwritten_unasked(tmp_path: Path) -> None:
    path = write(tmp_path, "mine")
    with pytest.raises(UserError, match="already there"):
        files.write_new(path, data=tmp_path)
    assert path.read_text() == "mine"
    with pytest.raises(UserError, match="no such folder of images"):
        files.write_new(tmp_path / "other.yaml", data=tmp_path / "nothing")
