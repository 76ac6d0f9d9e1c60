"""The files of a source, be it a folder, an archive or a store behind a URL: their names, their bytes, their places."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from gesso.data.images import EXTENSIONS
from gesso.data.places import Place, filesystem, retried
from gesso.data.sources.found import Found, some
from gesso.errors import UserError

CAPTION_ENDINGS = (".txt", ".caption", ".json")
TABLE_ENDINGS = (".jsonl", ".csv", ".parquet")
ARCHIVE_ENDINGS = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
_UNREAD = ".heic .heif .jxl .psd .svg .jp2 .exr .hdr .tga .dng .cr2 .nef .jfif .raw .arw .orf .rw2 .ico .pcx .ppm"
UNREAD_ENDINGS = frozenset(_UNREAD.split(" "))
"""Pictures that this package does not decode."""
_BESIDE = ".npz .npy .safetensors .pt .pth .xmp .aae .thm .mov .mp4 .wav .metadata"
_NO_TEXT = frozenset(_BESIDE.split(" "))
"""What programs keep beside a picture, and is no caption."""
MAX_TEXT = 1 << 20
"""Bytes of a caption file; what is longer is no caption."""
MASK = "-masklabel"
_OF_PROGRAMS = frozenset((".gesso", ".git", ".ipynb_checkpoints", ".thumbnails", ".DS_Store", "__MACOSX"))
_PICTURES = frozenset(EXTENSIONS)
_CHUNK = 2_000


class Tree(ABC):
    """Files under a root. `names` are relative to it, with forward slashes, sorted, hidden ones left out."""

    def __init__(self, root: str, names: Sequence[str]) -> None:
        self.root = root
        self.names = sorted(names)
        self._known = frozenset(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self._known

    @abstractmethod
    def place(self, name: str) -> Place:
        """Where a file's bytes are."""

    def shown(self, name: str) -> str:
        """How a file is named in messages."""
        return f"{self.root}/{name}" if name else self.root

    def read(self, name: str) -> bytes:
        """The bytes of one file, which need not be there."""
        return self.place(name).read()

    def texts(self, names: Sequence[str]) -> Iterator[bytes | UserError]:
        """The bytes of caption files, in order; what cannot be read or is too long comes as an error."""
        for name in names:
            try:
                yield self.short(name, self.read(name))
            except UserError as error:
                yield error

    def short(self, name: str, data: bytes) -> bytes:
        """`data`, if it is short enough for a caption."""
        if len(data) > MAX_TEXT:
            what = f"a caption file of more than {MAX_TEXT} bytes"
            raise UserError(what, where=self.shown(name), fix="shorten it, or rename it if it is no caption")
        return data


class LocalTree(Tree):
    """A folder of this machine, which `local` lists."""

    def place(self, name: str) -> Place:
        return Place(f"{self.root}/{name}")

    def texts(self, names: Sequence[str]) -> Iterator[bytes | UserError]:
        for name in names:
            path = f"{self.root}/{name}"
            try:
                handle = os.open(path, os.O_RDONLY)
                try:
                    data = os.read(handle, MAX_TEXT + 1)
                finally:
                    os.close(handle)
                yield data if len(data) <= 4096 else self.short(name, data)
            except OSError as error:
                yield UserError(f"cannot be read: {error.strerror}", where=path, fix="check the file")
            except UserError as error:
                yield error


class RemoteTree(Tree):
    """A folder behind a URL; `paths` says what the store calls each file."""

    def __init__(self, root: str, paths: Mapping[str, str]) -> None:
        super().__init__(root, list(paths))
        self._store, _ = filesystem(root)
        self._paths = paths

    def place(self, name: str) -> Place:
        return Place(str(self._store.unstrip_protocol(self._paths[name])))

    def texts(self, names: Sequence[str]) -> Iterator[bytes | UserError]:
        for start in range(0, len(names), _CHUNK):
            chunk = names[start : start + _CHUNK]
            read = {}
            if len(chunk) > 1:  # stores that can, answer many requests at once
                read = self._store.cat([self._paths[name] for name in chunk], on_error="return")
            for name in chunk:
                data = read.get(self._paths[name])
                try:
                    yield self.short(name, data if isinstance(data, bytes) else self.read(name))
                except UserError as error:
                    yield error


class ArchiveTree(Tree):
    """An archive's members below the folder `top`; `kept` are caption files that were read while it was listed."""

    def __init__(self, root: str, places: Mapping[str, Place], kept: Mapping[str, bytes], *, top: str) -> None:
        super().__init__(root, list(places))
        self._places, self._kept, self._top = places, kept, top

    def place(self, name: str) -> Place:
        return self._places[name]

    def shown(self, name: str) -> str:
        return f"{self.root}::{self._top}{name}" if name else self.root

    def read(self, name: str) -> bytes:
        return self._kept[name] if name in self._kept else self._places[name].read()


@dataclass(slots=True)
class Kinds:
    """The files of a tree by what they are; a stem is a name without its ending."""

    pictures: list[tuple[str, str]] = field(default_factory=list)
    """Stem and name."""
    sides: dict[str, list[str]] = field(default_factory=dict)
    """Stem -> caption files."""
    masks: dict[str, str] = field(default_factory=dict)
    """Stem of the picture -> its mask."""
    odd_masks: list[str] = field(default_factory=list)
    """Named as masks, but not .png, or the second of a picture."""
    tables: list[str] = field(default_factory=list)
    archives: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    """Pictures of kinds that are not read."""
    others: dict[str, list[str]] = field(default_factory=dict)
    """Stem -> files of endings that mean nothing here."""


def classify(tree: Tree, *, captions: Sequence[str] = CAPTION_ENDINGS) -> Kinds:
    """Sort a tree's files by their endings; `captions` are those of caption files."""
    kinds = Kinds()
    for name in tree.names:
        stem, dot, ending = name.rpartition(".")
        ending = ending.lower()
        if not dot or "/" in ending:
            continue
        ending = f".{ending}"
        if ending in _PICTURES:
            if stem[-len(MASK) :].lower() != MASK:
                kinds.pictures.append((stem, name))
            elif ending == ".png" and stem[: -len(MASK)] not in kinds.masks:
                kinds.masks[stem[: -len(MASK)]] = name
            else:
                kinds.odd_masks.append(name)
        elif ending in captions:
            kinds.sides.setdefault(stem, []).append(name)
        elif ending in TABLE_ENDINGS:
            kinds.tables.append(name)
        elif ending in UNREAD_ENDINGS:
            kinds.unread.append(name)
        elif name.lower().endswith(ARCHIVE_ENDINGS):
            kinds.archives.append(name)
        elif ending not in _NO_TEXT:
            kinds.others.setdefault(stem, []).append(name)
    return kinds


def is_picture(name: str) -> bool:
    """Whether a file's ending is that of a picture."""
    return name[name.rfind(".") :].lower() in _PICTURES


def is_hidden(name: str) -> bool:
    """Whether a file's or folder's own name marks it as none of the user's."""
    return name[:1] == "." or name == "__MACOSX"


def is_of_a_program(name: str) -> bool:
    """Whether a hidden file's or folder's own name is one that programs give, so that nobody need hear of it."""
    return name[:2] == "._" or name in _OF_PROGRAMS


def is_hidden_picture(name: str) -> bool:
    """Whether a file that is hidden, or in a hidden folder, is a picture that somebody may miss."""
    return is_picture(name) and not any(map(is_of_a_program, name.split("/")))


def notice_hidden(source: str, found: Found) -> None:
    """Say which hidden pictures there are, a folder at a time."""
    counts = Counter(map(_hidden_part, sorted(found.hidden)))
    told = [f"{part} ({count})" if part.endswith("/") else part for part, count in counts.items()]
    if told:
        found.notices.append(f"{source}: hidden, not read: {some(told)}")


def _hidden_part(name: str) -> str:
    """The file, or the outermost folder, that is hidden."""
    parts = name.split("/")
    at = next(i for i, part in enumerate(parts) if is_hidden(part)) + 1
    return "/".join(parts[:at]) + "/" * (at < len(parts))


def remote_tree(url: str, found: Found) -> RemoteTree:
    """The files under a URL that can be listed."""
    if url.startswith(("http://", "https://")):
        raise UserError(
            "the files behind a web address cannot be listed",
            where=url,
            fix="name a file (.zip, .tar, .parquet) or shards such as set-{000..099}.tar, or use hf://, s3://, gs://",
        )
    store, path = filesystem(url)
    try:
        listed = retried(lambda: store.find(path))
    except Exception as error:
        # What a store's library raises for a wrong key, a missing bucket or a dead line is its own.
        raise UserError(f"cannot be listed: {str(error) or type(error).__name__}", where=url, fix="check it") from error
    base = path.rstrip("/") + "/"
    paths = {full[len(base) :]: full for full in listed if full.startswith(base)}
    shown = {name: full for name, full in paths.items() if not any(map(is_hidden, name.split("/")))}
    found.hidden += [name for name in paths.keys() - shown.keys() if is_hidden_picture(name)]
    return RemoteTree(url.rstrip("/"), shown)
