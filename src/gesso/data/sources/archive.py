"""ZIP and TAR archives, read in place: nothing is ever unpacked to a disk, so no member's name can lead anywhere."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Sequence
from typing import NamedTuple

from gesso.data.images import EXTENSIONS
from gesso.data.places import Place, edge, open_file, unpacked
from gesso.data.sources.folder import has_repeats
from gesso.data.sources.found import Found, listed, some
from gesso.data.sources.tree import (
    CAPTION_ENDINGS,
    MAX_TEXT,
    TABLE_ENDINGS,
    ArchiveTree,
    is_hidden,
    is_hidden_picture,
)
from gesso.errors import UserError

MAX_MEMBER = 512 << 20
"""Bytes; a member that says it unpacks to more is taken for a bomb."""

_WANTED = (*EXTENSIONS, *CAPTION_ENDINGS, *TABLE_ENDINGS)
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)


class Member(NamedTuple):
    """A file in an archive: its name in the archive's folders, where its bytes are, and a caption file's content."""

    name: str
    place: Place
    text: bytes | None


def zip_members(url: str, found: Found) -> list[Member]:
    """The files in a ZIP; those that cannot be read are problems by name."""
    with (
        edge(url, "no ZIP archive, or a damaged one", fix="make it again"),
        open_file(url) as file,
        zipfile.ZipFile(file) as archive,
    ):
        infos = archive.infolist()
    members: list[Member] = []
    locked: list[str] = []
    for info in infos:
        name = "" if info.is_dir() else _name(info.filename, url, found)
        if not name:
            continue
        wanted = name.lower().endswith(_WANTED)
        if wanted and info.flag_bits & 1:
            locked.append(name)
        elif (wanted and _is_sound(name, info.file_size, url, found, method=info.compress_type)) or not wanted:
            members.append(Member(name, Place(url, "zip", info.filename), None))
    if locked:
        what = f"encrypted, so not readable: {listed(locked)}"
        found.problems.append(UserError(what, where=url, fix="make the archive again without a password"))
        found.refused |= {f"{url}::{name}" for name in locked}
    return _unique(members, url, found)


def tar_members(url: str, found: Found, *, packed: bool = False) -> list[Member]:
    """The files in a TAR; with `packed`, of a compressed one."""
    members: list[Member] = []
    with (
        edge(url, "no TAR archive, or a damaged one", fix="make it again"),
        io.BytesIO(unpacked(url)) if packed else open_file(url) as file,
        tarfile.open(fileobj=file, mode="r:") as archive,
    ):
        while (info := archive.next()) is not None:
            member = _tar_member(archive, info, url, packed, found)
            if member is not None:
                members.append(member)
            archive.members.clear()  # type: ignore[attr-defined]  # it would remember a million headers
        file.seek(archive.offset)
        if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise tarfile.ReadError(f"a damaged header at byte {archive.offset}")
    return _unique(members, url, found)


def _tar_member(archive: tarfile.TarFile, info: tarfile.TarInfo, url: str, packed: bool, found: Found) -> Member | None:
    if info.isdir():
        return None
    name = _name(info.name, url, found)
    if not name:
        return None
    wanted = name.lower().endswith(_WANTED)
    if wanted and (not info.isreg() or info.issparse()):
        kind = "a link" if info.issym() or info.islnk() else "no plain file"
        found.refuse(f"{url}::{name}", f"{kind} in an archive", fix="make the archive again with plain files")
        return None
    if wanted and not _is_sound(name, info.size, url, found):
        return None
    text = None
    if name.lower().endswith(CAPTION_ENDINGS) and info.size <= MAX_TEXT:
        read = archive.extractfile(info)
        text = read.read() if read is not None else None
    return Member(name, Place(url, "packed" if packed else "stretch", name, info.offset_data, info.size), text)


def _is_sound(name: str, size: int, url: str, found: Found, *, method: int = zipfile.ZIP_STORED) -> bool:
    what, fix = "", "make the archive again"
    if size > MAX_MEMBER:
        what, fix = f"it says that it unpacks to {size >> 20} MiB, more than {MAX_MEMBER >> 20}", "leave it out"
    elif method not in _METHODS:
        what = f"packed with method {method}, which is not read"
    if what:
        found.refuse(f"{url}::{name}", what, fix=fix)
    return not what


def _name(raw: str, url: str, found: Found) -> str:
    """A member's name with plain slashes; empty if it is hidden, or leads out of the archive (a problem)."""
    parts = [part for part in raw.replace("\\", "/").split("/") if part != "."]
    if ".." in parts or raw[:1] in ("/", "\\") or parts[0][1:2] == ":":
        shown = raw.encode("utf-8", "backslashreplace").decode()
        what = f"the member '{shown}' leads out of the archive"
        found.problems.append(UserError(what, where=url, fix="make the archive again with relative names"))
        return ""
    name = "/".join(part for part in parts if part)
    if any(map(is_hidden, parts)):
        found.hidden += [name] if is_hidden_picture(name) else []
        return ""
    if not name.isascii() and name.encode("utf-8", "ignore").decode() != name:
        shown = name.encode("utf-8", "backslashreplace").decode()
        found.refuse(f"{url}::{shown}", "the member's name is not UTF-8", fix="rename it")
        return ""
    return name


def _unique(members: list[Member], url: str, found: Found) -> list[Member]:
    by_name = {member.name: member for member in members}
    if len(by_name) == len(members):
        return members
    seen: set[str] = set()
    twice = [m.name for m in members if m.name in seen or seen.add(m.name)]  # type: ignore[func-returns-value]
    what = f"several members of one name: {some(twice)}"
    found.problems.append(UserError(what, where=url, fix="make the archive again"))
    return list(by_name.values())


def tree_of(url: str, members: Sequence[Member]) -> ArchiveTree:
    """The members as a tree; the one folder that all lie in is its root, if it holds folders or a table."""
    top = members[0].name.partition("/")[0] + "/" if members else ""
    inner = [member.name[len(top) :] for member in members]
    common = all(member.name.startswith(top) for member in members) and not has_repeats(top[:-1])
    deep = any("/" in name for name in inner) or any(name.startswith("metadata.") for name in inner)
    if not (common and deep):
        top = ""
    places = {member.name[len(top) :]: member.place for member in members}
    kept = {member.name[len(top) :]: member.text for member in members if member.text is not None}
    return ArchiveTree(url, places, kept, top=top)
