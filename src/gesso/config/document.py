"""YAML 1.2 text to plain values with the line of every key, and back."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gesso.errors import Problems, UserError

KeyPath = tuple[str | int, ...]

_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?[0-9]+")
_BASED = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_PLAIN = re.compile(r"[A-Za-z_./~][\w./~+ -]*", re.ASCII)
_STRING_TAG = "tag:yaml.org,2002:str"
_DEEPEST = 100


@dataclass(frozen=True)
class Document:
    """A mapping read from text; `lines` gives the 1-based line of each key and list item."""

    data: dict[str, Any]
    lines: dict[KeyPath, int]
    file: str


def read(path: Path, *, what: str = "run file") -> Document:
    """Read a YAML file. Raises `UserError` for one that is missing, a folder, not UTF-8, empty or malformed."""
    if path.is_dir():
        inside = path / "run.yaml"
        fix = f"give {inside}" if inside.is_file() else f"give the path of the {what} itself"
        raise UserError(f"this is a folder, not a {what}", where=str(path), fix=fix)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"there is no such {what}", where=str(path), fix=_neighbours(path)) from None
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise UserError("not UTF-8 text", where=f"{path}:{line}", fix="save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(path)) from None
    return parse(text, file=str(path))


def parse(text: str, *, file: str) -> Document:
    """Parse YAML text whose top level is a mapping; raises `UserError` with the line."""
    node = _compose(text, file)
    if node is None:
        raise UserError("the file is empty", where=file, fix="gesso new DATA_FOLDER writes one to start from")
    reader = _Reader(file)
    data = reader.value(node, ())
    if reader.duplicates:
        raise reader.duplicates[0] if len(reader.duplicates) == 1 else Problems(reader.duplicates)
    if not isinstance(data, dict):
        raise UserError("the file holds no `key: value` lines", where=f"{file}:1", fix="see examples/ for run files")
    return Document(data, reader.lines, file)


def value(text: str, *, where: str) -> Any:
    """One value as it would stand after `key: ` in a file: a scalar, or a list or mapping in brackets."""
    if text[:1] not in ("[", "{", '"', "'"):
        return plain(text.strip())
    return _Reader(where).value(_compose(text, where), ())


def plain(text: str) -> Any:
    """An unquoted scalar by the YAML 1.2 core schema; whole floats such as 1e3 become integers."""
    if _NULL.fullmatch(text):
        return None
    if text in _BOOL:
        return _BOOL[text]
    if _INT.fullmatch(text):
        return int(text)
    if _BASED.fullmatch(text):
        return int(text, 0)
    if _FLOAT.fullmatch(text):
        number = float(text)
        return int(number) if number.is_integer() and abs(number) < 2**53 else number
    if _NOT_FINITE.fullmatch(text):
        return float(text.replace(".", ""))
    return text


def emit(data: Mapping[str, Any], *, comments: Mapping[KeyPath, str] | None = None) -> str:
    """YAML text that `parse` reads back to equal values; `comments` go above their keys."""
    return "\n".join(_block(data, (), comments or {})) + "\n"


class _Reader:
    """Turns composed nodes into values and notes where they stand."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.lines: dict[KeyPath, int] = {}
        self.duplicates: list[UserError] = []

    def value(self, node: Any, path: KeyPath) -> Any:
        from ruamel.yaml.nodes import MappingNode, SequenceNode

        if len(path) > _DEEPEST:
            raise UserError("nested too deeply (an anchor that holds itself?)", where=self.file)
        if isinstance(node, MappingNode):
            return self._mapping(node, path)
        if isinstance(node, SequenceNode):
            items = []
            for i, item in enumerate(node.value):
                self.lines[(*path, i)] = item.start_mark.line + 1
                items.append(self.value(item, (*path, i)))
            return items
        if not str(node.tag).startswith("tag:yaml.org,2002:"):
            where = f"{self.file}:{node.start_mark.line + 1}"
            raise UserError(
                f"{node.tag} is a YAML tag, which run files do not use", where=where, fix="put it in quotes"
            )
        return node.value if node.style or str(node.tag) == _STRING_TAG else plain(node.value)

    def _mapping(self, node: Any, path: KeyPath) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node.value, str):
                raise UserError("a key must be a word", where=f"{self.file}:{line}")
            here = (*path, key_node.value)
            if key_node.value in result:
                first = self.lines[here]
                what = f"{dotted(here)} is given twice (first on line {first})"
                self.duplicates.append(UserError(what, where=f"{self.file}:{line}", fix="keep one of them"))
                continue
            self.lines[here] = line
            result[key_node.value] = self.value(value_node, here)
        return result


def file_name(text: str) -> str:
    """Text as a run's name: other characters become dashes. Empty where nothing is left."""
    return "".join(c if c.isalpha() or c.isdecimal() or c in "_. -" else "-" for c in text).lstrip(" .-")


def dotted(path: KeyPath) -> str:
    """`("data", "sources", 0)` as `data.sources.0`."""
    return ".".join(str(part) for part in path)


def _compose(text: str, file: str) -> Any:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError
    from ruamel.yaml.reader import ReaderError

    try:
        return YAML(typ="safe", pure=True).compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        number = mark.line + 1 if mark is not None else 1
        raise _syntax(text, number, error.problem or "cannot be parsed", file) from None
    except ReaderError as error:
        number = text[: error.position].count("\n") + 1
        raise UserError("a character that YAML does not allow", where=f"{file}:{number}", fix="remove it") from None
    except (YAMLError, ValueError) as error:
        raise UserError(f"not valid YAML: {error}", where=file) from None


def _syntax(text: str, number: int, problem: str, file: str) -> UserError:
    """A parse error in the user's terms; the culprit is often the line before the one the parser names."""
    lines = text.split("\n")
    for candidate in (number, number - 1):
        if 0 < candidate <= len(lines) and re.match(r" *\t", lines[candidate - 1]):
            return UserError("a tab is used to indent", where=f"{file}:{candidate}", fix="indent with spaces")
    shown = lines[number - 1].strip() if 0 < number <= len(lines) else ""
    fix = "check the indentation and put text that holds : # [ ] { } in quotes"
    return UserError(
        f"not valid YAML: {problem}" + (f" at `{shown}`" if shown else ""), where=f"{file}:{number}", fix=fix
    )


def _neighbours(path: Path) -> str:
    folder = path.parent if path.parent.is_dir() else Path()
    names = sorted(p.name for p in folder.iterdir() if p.suffix in (".yaml", ".yml"))
    if names:
        return f"in {folder.resolve()} there is {', '.join(names[:5])}"
    return "gesso new DATA_FOLDER writes one to start from"


def _block(data: Mapping[str, Any], path: KeyPath, comments: Mapping[KeyPath, str]) -> list[str]:
    lines: list[str] = []
    for key, item in data.items():
        here = (*path, key)
        if here in comments:
            lines += [f"# {line}" for line in textwrap.wrap(comments[here], 100)]
        if isinstance(item, Mapping) and item:
            lines += [f"{_text(key)}:", *_indent(_block(item, here, comments))]
        elif isinstance(item, list | tuple) and item:
            lines += [f"{_text(key)}:", *_indent(_items(item, here, comments))]
        else:
            lines.append(f"{_text(key)}: {flow(item)}")
    return lines


def _items(items: list[Any] | tuple[Any, ...], path: KeyPath, comments: Mapping[KeyPath, str]) -> list[str]:
    lines: list[str] = []
    for i, item in enumerate(items):
        if isinstance(item, Mapping) and item:
            # A comment above the first key would stand behind the dash, so it goes before it.
            body = _block(item, (*path, i), comments)
            first = next(n for n, line in enumerate(body) if not line.startswith("#"))
            lines += [*body[:first], f"- {body[first]}", *_indent(body[first + 1 :])]
        else:
            lines.append(f"- {flow(item)}")
    return lines


def _indent(lines: list[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def flow(item: Any) -> str:
    """A value on one line, as it would stand after `key: `."""
    if item is None:
        return "null"
    if isinstance(item, bool):
        return "true" if item else "false"
    if isinstance(item, int | float):
        return repr(item)
    if isinstance(item, str):
        return _text(item)
    if isinstance(item, list | tuple):
        return "[" + ", ".join(flow(i) for i in item) + "]"
    return "{" + ", ".join(f"{_text(k)}: {flow(v)}" for k, v in item.items()) + "}"


def _text(text: str) -> str:
    if _PLAIN.fullmatch(text) and text == text.strip() and plain(text) == text:
        return text
    body = json.dumps(text, ensure_ascii=False)
    return re.sub(
        r"[^\x20-\x7e\xa0-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]|[\u2028\u2029]", _escape, body
    )


def _escape(match: re.Match[str]) -> str:
    code = ord(match.group())
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
