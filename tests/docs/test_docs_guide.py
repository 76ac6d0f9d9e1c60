"""What the pages show is true: files load, commands and options exist, old keys become the new ones named."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from docs_helpers import (
    DATA,
    GUIDE,
    PAGES,
    README,
    ROOT,
    Block,
    anchors,
    blocks,
    links,
    prose,
    source_strings,
    spans,
    tables,
)
from PIL import Image

from gesso import errors
from gesso.cli import dreambooth, failure, show
from gesso.cli.app import app
from gesso.config import advice, dialects, document, files, presets, schema
from gesso.config.run import RunConfig, Source
from gesso.data.preflight import preflight

TAUGHT = (README, GUIDE, DATA)
YAML = [block for page in TAUGHT for block in blocks(page, "yaml")]
COMMANDS = [
    (block.where, line)
    for page in TAUGHT
    for block in blocks(page, "bash")
    for line in block.text.replace("\\\n", " ").splitlines()
    if line.startswith("gesso ")
]
PYTHON = [block for page in TAUGHT for block in blocks(page, "python")]
MINIMAL = "data: {sources: [{path: photos}]}\ntraining: {steps: 100}\n"
# Where these are missing it is the reader's machine that lacks something, not the page.
ABOUT_THE_MACHINE = ("model.", "training.attention", "training.optimizer.type", "trackers.", "training.device")


def test_there_is_something_to_test() -> None:
    assert len(YAML) > 15
    assert len(COMMANDS) > 15
    assert len(PYTHON) > 3


# Run files


@pytest.mark.parametrize("block", YAML, ids=lambda block: block.where)
def test_a_run_file_loads_and_passes_the_check(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = document.parse(block.text, file=block.where).data
    if isinstance(data.get("data"), str):
        stand_in(Source(path=str(tmp_path / "hare")))
        (tmp_path / data["data"]).write_text('datasets = [{resolution = 1024, subsets = [{image_dir = "hare"}]}]')
    loaded = files.load_text(document.emit(completed(data)), folder=tmp_path, file=block.where)
    for source in loaded.run.data.sources:
        stand_in(source)
    if loaded.run.data.validation.path is not None:
        stand_in(Source(path=str(loaded.run.data.validation.path)))
    found = advice.check(loaded.run)
    assert [f for f in found.errors if not f.key.startswith(ABOUT_THE_MACHINE)] == []


def completed(data: dict[str, Any]) -> dict[str, Any]:
    """A part of a run file with pictures and a length where it names none; other tools' files are whole."""
    if dialects.detect(data) is None:
        if not isinstance(data.get("data"), str):
            data.setdefault("data", {}).setdefault("sources", [{"path": "photos"}])
        if "preset" not in data and not {"steps", "epochs"} & set(data.setdefault("training", {})):
            data["training"]["steps"] = 100
    return data


def stand_in(source: Source) -> None:
    """As many captioned pictures as the rules ask for, in the layout that the source names; a file is only there."""
    if source.path.startswith("hub:") or "://" in source.path or "{" in source.path:
        return
    folder = Path(source.path)
    if folder.suffix:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.write_bytes(b"")
        return
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{i:03d}.png" for i in range(12)]
    for name in names:
        (folder / name).write_bytes(b"")
        if source.metadata is None and source.missing_captions == "error":
            (folder / name).with_suffix(source.caption_extension or ".txt").write_text("a caption")
    if source.metadata is not None:
        listing = folder / source.metadata
        listing.parent.mkdir(parents=True, exist_ok=True)
        columns = source.image_column or "file_name", source.caption_column or "text"
        listing.write_text("".join(json.dumps(dict(zip(columns, (n, "x"), strict=True))) + "\n" for n in names))


def test_what_the_check_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "photos").mkdir()
    for i in range(12):
        noise = np.random.default_rng(i).integers(0, 256, (8, 8), np.uint8)
        size = (832, 1216) if i % 3 == 0 else (1024, 1024)
        # Bitmaps have the same bytes, and so the same split, whatever wrote them.
        Image.fromarray(noise).resize(size, Image.Resampling.NEAREST).save(tmp_path / "photos" / f"{i:03d}.bmp")
        (tmp_path / "photos" / f"{i:03d}.txt").write_text("a photo of sks aldar")
    files.write_new(tmp_path / "run.yaml", data=tmp_path / "photos", trigger="sks aldar")
    run = files.load(tmp_path / "run.yaml", sets=[f"data.cache={tmp_path / 'cache'}"]).run
    seen = preflight(run)
    numbers = advice.check(run, counted=seen.counted).forecast
    assert numbers is not None
    show.images(seen)
    expected = [*show.forecast_lines(numbers), *capsys.readouterr().out.splitlines(), "ok: gesso train run.yaml"]
    (shown,) = [block.text for block in blocks(GUIDE, "text") if block.text.startswith("images ")]
    assert shown.splitlines() == expected


# The command line


@pytest.mark.parametrize(("where", "line"), COMMANDS, ids=[f"{where} {line[:40]}" for where, line in COMMANDS])
def test_a_command_line_parses(where: str, line: str) -> None:
    _, *arguments = shlex.split(line, comments=True)
    command: Any = typer.main.get_command(app)
    while arguments and arguments[0] in vars(command).get("commands", {}):
        words = 2 if " ".join(arguments[:2]) in command.commands else 1
        command = command.commands[" ".join(arguments[:words])]
        arguments = arguments[words:]
    if command.name == "train dreambooth":
        assert not files.load_options(dreambooth.options(arguments), folder=Path("/")).report.refused  # type: ignore[union-attr]
    assert "commands" not in vars(command), f"{where}: no such command: {line}"
    given = command.make_context(command.name, arguments).params
    if sets := given.get("sets"):
        files.load_text(MINIMAL, folder=Path("/"), sets=list(sets))
    for key in given.get("accept", ()):
        assert schema.locate(tuple(key.split(".")))[1] is not None, f"{where}: no key {key}"
    assert given.get("preset", "character") in presets.names()


def test_a_wrong_option_would_be_noticed() -> None:
    with pytest.raises(Exception, match=r"[Nn]o such option"):
        test_a_command_line_parses("x", "gesso train run.yaml --sett a=1")
    with pytest.raises(AssertionError, match="no such command"):
        test_a_command_line_parses("x", "gesso trian run.yaml")
    with pytest.raises(errors.UserError, match="unknown key"):
        test_a_command_line_parses("x", "gesso train run.yaml --set training.step=1")


@pytest.mark.parametrize("page", TAUGHT, ids=lambda page: page.name)
def test_commands_and_options_in_the_text_exist(page: Path) -> None:
    top: Any = typer.main.get_command(app)
    groups = {name: command for name, command in top.commands.items() if "commands" in vars(command)}
    commands = [top, *top.commands.values(), *(one for group in groups.values() for one in group.commands.values())]
    options = {name for command in commands for p in command.params for name in (*p.opts, *p.secondary_opts)}
    for span in spans(prose(page)):
        first, *rest = span.split()[:3]
        if first == "gesso" and rest and not rest[0].startswith("-"):
            assert rest[0] in top.commands, span
            assert rest[0] not in groups or len(rest) == 1 or rest[1] in groups[rest[0]].commands, span
        if first.startswith("--"):
            assert first.partition("=")[0] in options, span


@pytest.mark.parametrize(("page", "least"), [(GUIDE, 30), (DATA, 30)], ids=["guide.md", "data.md"])
def test_keys_in_the_text_exist(page: Path, least: int) -> None:
    sections = "|".join(name for name, info in RunConfig.model_fields.items() if schema.models_in(info.annotation))
    pattern = re.compile(rf"({sections})(\[\])?\.[a-z][\w.\[\]]*")
    ours = "\n".join(line for line in prose(page).splitlines() if not re.match(r"\| `.*: .*` \| `.*: .*` \|", line))
    keys = [span.partition(":")[0] for span in spans(ours) if pattern.fullmatch(span.partition(":")[0])]
    assert len(keys) > least
    for key in keys:
        parts = key.replace("[]", ".0").split(".")
        assert schema.locate(tuple(int(p) if p.isdigit() else p for p in parts))[1] is not None, key


# Other tools' keys

NESTED = {"dataset": {"train_data_dir": "photos"}, "training": {"max_train_steps": 10}}
FLAT = {"train_data_dir": "photos", "max_train_steps": 10, "output_dir": "out"}
RENAMED = [row for table in tables(GUIDE) if table[0] == ["there", "here"] for row in table[1:]]


def test_there_are_two_tables_of_renamed_keys() -> None:
    assert sum(table[0] == ["there", "here"] for table in tables(GUIDE)) == 2
    assert len(RENAMED) > 40


@pytest.mark.parametrize("row", RENAMED, ids=lambda row: row[0])
def test_an_old_key_becomes_the_new_one(row: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (old, value), (new, expected) = (cell.strip("`").split(": ", 1) for cell in row)
    *section, key = old.split(".")
    if section:
        data: dict[str, Any] = {name: dict(values) for name, values in NESTED.items()}
        data.setdefault(section[0], {})[key] = document.value(value, where=old)
    else:
        data = {k: v for k, v in FLAT.items() if not (key == "num_train_epochs" and k == "max_train_steps")}
        data[key] = document.value(value, where=old)
    loaded = files.load_text(document.emit(data), folder=tmp_path)
    assert loaded.report is not None, "read as a file of ours"
    found: Any = loaded.run.model_dump(mode="json")
    for part in new.split("."):
        found = found[int(part) if part.isdigit() else part]
    assert found == document.value(expected, where=new)


# Messages and exit codes


def test_the_messages_are_the_code_s_own() -> None:
    (table,) = [table for table in tables(GUIDE) if table[0][0] == "message"]
    shown = [part for row in table[1:] for span in spans(row[0]) for part in span.split("…")]
    assert len(shown) > 20
    for message in shown:
        # torch's own; every other one is ours
        assert message in source_strings() or message == "CUDA out of memory", f"no message says '{message}'"


def test_the_exit_codes_are_all_there() -> None:
    (table,) = [table for table in tables(GUIDE) if table[0][0] == "exit code"]
    kinds = [errors.UserError, *errors.UserError.__subclasses__()]
    assert {int(row[0]) for row in table[1:]} == {0, failure.UNEXPECTED, *(kind.exit_code for kind in kinds)}


# Links and Python


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_pictures_exist(page: Path) -> None:
    for target in links(page):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(path), f"{page.name}: {target}"


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.where)
def test_python_compiles_and_calls_what_there_is(block: Block) -> None:
    tree = ast.parse(block.text, filename=block.where)
    known: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            known |= {alias.name: importlib.import_module(alias.name) for alias in node.names if alias.name == "gesso"}
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("gesso"):
            module = importlib.import_module(str(node.module))
            known |= {alias.name: getattr(module, alias.name) for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and isinstance(node.targets[0], ast.Name):
            made = called(node.value, known)
            known |= {node.targets[0].id: made} if inspect.isclass(made) else {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (function := called(node, known)) is not None:
            method = (
                isinstance(node.func, ast.Attribute)
                and inspect.isfunction(function)
                and "self" in str(inspect.signature(function))
            )
            keywords = {str(k.arg): None for k in node.keywords}
            inspect.signature(function).bind(*[None] * (len(node.args) + method), **keywords)


def called(node: ast.Call, known: dict[str, Any]) -> Any:
    """What a call calls, if it is something of ours: a name, or an attribute of one."""
    match node.func:
        case ast.Name(id=name):
            return known.get(name) if not isinstance(known.get(name), type(ast)) else None
        case ast.Attribute(value=ast.Name(id=name), attr=attribute) if name in known:
            return getattr(known[name], attribute)
    return None
