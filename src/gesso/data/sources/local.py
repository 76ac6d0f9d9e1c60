"""The files under a local folder, and whether they are as they were, without any of them being opened."""

from __future__ import annotations

import hashlib
import itertools
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from gesso.data.places import RACY_NS, is_racy, is_url
from gesso.data.sources.found import Found, some
from gesso.data.sources.tree import LocalTree, is_hidden, is_hidden_picture, is_of_a_program, is_picture
from gesso.errors import UserError

_LOOK = 10_000
"""Files under a link that are looked at: it may lead to the root of a disk."""


def local_tree(root: str, found: Found) -> LocalTree:
    """The files under a local folder. Links to folders are not followed; links to pictures outside it are refused."""
    names: list[str] = []
    walk = _Walk(root, found)
    for name, entry in walk.files():
        if entry.is_symlink():
            if _is_inside(entry.path, root, name, found):
                names.append(name)
        elif name.isascii() or _is_text(name, root, found):
            if entry.is_file(follow_symlinks=False):
                names.append(name)
            elif is_picture(name):
                found.notices.append(f"{root}/{name}: neither a file nor a folder, so not read")
    inside = [name for name in sorted(walk.linked) if not _leads_to_pictures(f"{root}/{name}", root, found)]
    if inside:
        found.notices.append(f"{root}: links to folders are not followed: {some(inside)}")
    return LocalTree(root, names)


@dataclass(slots=True)
class _Walk:
    """A walk through a folder: its files, and on the way the folders that are linked into it."""

    root: str
    found: Found
    linked: list[str] = field(default_factory=list)

    def files(self) -> Iterator[tuple[str, os.DirEntry[str]]]:
        """Names relative to the root, without what is hidden."""
        folders = [""]
        while folders:
            folder = folders.pop()
            try:
                with os.scandir(f"{self.root}/{folder}") as entries:
                    for entry in entries:
                        name = folder + entry.name
                        if is_hidden(entry.name):
                            self.found.hidden += _hidden_pictures(name, entry)
                        elif entry.is_dir(follow_symlinks=False):
                            folders.append(f"{name}/")
                        elif entry.is_symlink() and entry.is_dir():
                            self.linked.append(name)
                        else:
                            yield name, entry
            except OSError as error:
                what = f"this folder cannot be read: {error.strerror}"
                where = f"{self.root}/{folder}"
                self.found.problems.append(UserError(what, where=where, fix="check its permissions"))


def _hidden_pictures(name: str, entry: os.DirEntry[str]) -> list[str]:
    if is_of_a_program(entry.name):
        return []
    if not entry.is_dir(follow_symlinks=False):
        return [name] if is_picture(name) else []
    inside = (f"{name}/{os.path.relpath(path, entry.path)}" for path in _files_under(entry.path))
    return [path for path in inside if is_hidden_picture(path)]


def _files_under(folder: str) -> Iterator[str]:
    for base, _, files in os.walk(folder):
        yield from (f"{base}/{file}" for file in files)


def _is_text(name: str, root: str, found: Found) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        shown = os.fsencode(f"{root}/{name}").decode("utf-8", "backslashreplace")
        found.refuse(shown, "the file's name is not UTF-8", fix="rename it")
        return False
    return True


def _is_inside(path: str, root: str, name: str, found: Found) -> bool:
    target = os.path.realpath(path)
    outside = not f"{target}/".startswith(f"{root}/")
    usable = not outside and os.path.isfile(target)
    if not usable and is_picture(name):
        what = "this is a link to a file outside the folder" if outside else "this is a link to nothing"
        found.refuse(path, what, fix="keep the pictures inside the source's folder")
    return usable


def _leads_to_pictures(path: str, root: str, found: Found) -> bool:
    """Whether a linked folder lies outside the root and holds pictures, which is a problem."""
    target = os.path.realpath(path)
    if f"{target}/".startswith(f"{root}/") or f"{root}/".startswith(f"{target}/"):
        return False  # what is in it is read where it is, or it is a loop
    if not any(map(is_picture, itertools.islice(_files_under(target), _LOOK))):
        return False
    what = f"this is a link to a folder outside, with pictures that are not read: {target}"
    found.refuse(path, what, fix="give that folder as a source of its own, or copy it here")
    return True


def stamp_of_folder(root: str) -> str | None:
    """A hash of every file's name, size, times and inode; None if one was written this very moment."""
    lines: list[str] = []
    newest = 0
    now = time.time_ns()
    folders = [""]
    try:
        while folders:
            folder = folders.pop()
            with os.scandir(f"{root}/{folder}") as entries:
                for entry in entries:
                    name = entry.name
                    if name[0] in "._" and is_of_a_program(name):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(f"{folder}{name}/")
                        continue
                    status = entry.stat()
                    written, changed = status.st_mtime_ns, status.st_ctime_ns
                    newest = max(newest, written, changed)
                    lines.append(f"{folder}{name}\0{status.st_size} {written} {changed} {status.st_ino}")
    except OSError:
        return None  # what it is that cannot be read is said where it is read
    if now - newest <= RACY_NS:
        return None
    lines.sort()
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogatepass")).hexdigest()


def stamp_of_files(paths: Sequence[str]) -> str | None:
    """As `stamp_of_folder`, of some files alone."""
    lines = []
    now = time.time_ns()
    for path in paths:
        try:
            status = os.stat(path)
        except OSError:
            return None
        if is_url(path) or is_racy(status, now):
            return None
        lines.append(f"{path}\0{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}")
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogatepass")).hexdigest()
