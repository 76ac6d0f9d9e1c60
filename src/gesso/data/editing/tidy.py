"""Changes to whole data sets: a metadata file for a folder, duplicates out of the way, a part held out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gesso.data import index
from gesso.data.editing.collection import Item, Library
from gesso.data.editing.journal import Journal
from gesso.data.editing.tables import CaptionTable, json_line
from gesso.data.images import content_hash, probe, read
from gesso.data.inspection import near
from gesso.errors import Problems, UserError


@dataclass(frozen=True)
class Written:
    """A metadata file that was written: its rows, and how many captions were there before."""

    file: Path
    rows: int
    kept: int


def write_metadata(
    folder: Path,
    *,
    prompt: str | None,
    output: Path | None = None,
    image_column: str = "file_name",
    caption_column: str = "text",
    overwrite: bool = False,
    replace: bool = False,
    command: str = "metadata",
) -> Written:
    """List every picture of a folder with its caption in a metadata.jsonl, there or in a folder above it.

    Captions that the folder has are kept, unless `overwrite`; the others get `prompt`. A file that exists is only
    written over with `replace`.
    """
    file = (folder / "metadata.jsonl" if output is None else output).expanduser().absolute()
    file = file.parent.resolve() / file.name
    if file.suffix != ".jsonl":
        raise UserError("the metadata file must end in .jsonl", where=str(file), fix="name it metadata.jsonl")
    if file.exists() and not replace:
        raise UserError("the file exists", where=str(file), fix="add --replace to write over it (undo brings it back)")
    library = Library(folder)
    if not library.folder.is_relative_to(file.parent):
        raise UserError(
            "paths in a metadata file cannot lead out of its folder",
            where=str(file),
            fix=f"write it into {library.folder} or a folder above it",
        )
    texts = {item.picture: prompt if overwrite and prompt is not None else item.caption for item in library.items}
    missing = [item.name for item in library.items if texts[item.picture] is None]
    if missing and prompt is None:
        raise UserError(
            f"{len(missing)} pictures have no caption, such as {missing[0]}",
            where=str(folder),
            fix="give them one with --prompt",
        )
    lines = []
    for item in library.items:
        name = item.picture.relative_to(file.parent).as_posix()
        text = texts[item.picture] or prompt or ""
        lines.append(json_line(name, text, image_column=image_column, caption_column=caption_column))
    with Journal(file.parent).begin(command) as edit:
        edit.write(file, "".join(lines).encode())
    return Written(file, len(lines), 0 if overwrite else len(lines) - len(missing))


@dataclass(frozen=True)
class Group:
    """Pictures that show the same: the one that stays, and the others."""

    keep: Item
    others: tuple[Item, ...]


def duplicates(library: Library, *, progress: Callable[[int, int], None] | None = None) -> list[Group]:
    """Groups of pictures whose files are equal to the byte, each with the best captioned first."""
    groups: dict[str, list[Item]] = {}
    for done, item in enumerate(library.items, start=1):
        groups.setdefault(content_hash(read(item.picture)), []).append(item)
        if progress is not None:
            progress(done, len(library.items))
    return [_group(items, {}) for items in groups.values() if len(items) > 1]


def near_duplicates(
    library: Library, distance: int, *, progress: Callable[[int, int], None] | None = None
) -> list[Group]:
    """Groups of pictures that look the same, or are equal: perceptual hashes at most `distance` bits of 64 apart.

    The largest comes first, then the best captioned.
    """
    prints: list[near.Print] = []
    exact: dict[str, list[int]] = {}
    for done, item in enumerate(library.items, start=1):
        exact.setdefault(content_hash(read(item.picture)), []).append(done - 1)
        prints.append(near.picture_hash(item.picture))
        if progress is not None:
            progress(done, len(library.items))
    groups = near.near_duplicates(prints, distance)
    # Equal files without a hash, of one colour, are duplicates as well.
    taken = {i for group in groups for i in group}
    groups += [group for group in exact.values() if len(group) > 1 and not taken & set(group)]
    items = [[library.items[i] for i in group] for group in groups]
    return [_group(group, {item.picture: _area(item.picture) for item in group}) for group in items]


def _group(items: Sequence[Item], areas: dict[Path, int]) -> Group:
    def rank(item: Item) -> tuple[int, int, int, str]:
        # Of equals the shortest name stays: "a.png" rather than "a (1).png".
        return -areas.get(item.picture, 0), -len(item.caption or ""), len(item.name), item.name

    first, *others = sorted(items, key=rank)
    return Group(first, tuple(others))


def _area(picture: Path) -> int:
    width, height = probe(picture)
    return width * height


def remove_duplicates(library: Library, groups: Sequence[Group], *, command: str = "dedupe") -> int:
    """Take the others of each group away, with their captions and masks, into the originals; returns how many.

    If what stays has no caption, it takes over the longest of the group.
    """
    count = 0
    with Journal(library.folder).begin(command) as edit:
        for group in groups:
            captions = [item.caption for item in group.others if item.caption]
            if group.keep.caption is None and captions:
                library.write(edit, group.keep, max(captions, key=len))
            for item in group.others:
                for path in [*library.belongings(item), item.picture]:
                    edit.remove(path)
                count += 1
        library.drop_rows([item.picture for group in groups for item in group.others])
        library.flush(edit)
    return count


def held_out(library: Library, fraction: float) -> list[Item]:
    """The pictures that a run with this validation share would hold out: each by its own content, so that new
    pictures move no other across."""
    images = {item.picture: content_hash(read(item.picture)) for item in library.items}
    held = index.held_out(images.values(), fraction, where="--validation")
    return [item for item in library.items if images[item.picture] in held]


def split(
    library: Library, held: Sequence[Item], output: Path, *, copy: bool = False, command: str = "split"
) -> list[Path]:
    """Move, or copy, pictures with their captions and masks to another folder, under the names they have here."""
    output = output.expanduser().absolute().resolve()
    if output.is_relative_to(library.folder) or library.folder.is_relative_to(output):
        raise UserError(
            "one folder holds the other, so the pictures would be read twice",
            where=str(output),
            fix="name a folder beside the data set",
        )
    moves = [(path, output / path.relative_to(library.folder)) for path in _with_belongings(library, held)]
    in_the_way = [UserError("the file exists", where=str(to), fix="move it away") for _, to in moves if to.exists()]
    table = library.table
    listing = None if table is None else output / table.file.resolve().relative_to(library.folder)
    if listing is not None and listing.exists():
        in_the_way.append(UserError("the file exists", where=str(listing), fix="move it away"))
    if in_the_way:
        raise Problems(in_the_way, what="nothing was moved")
    with Journal(library.folder, also=[output]).begin(command) as edit:
        if table is not None and listing is not None:
            edit.write(listing, _rows_of(table, held))
        for path, to in moves:
            if copy:
                edit.write(to, path.read_bytes())
            else:
                edit.rename(path, to)
        if not copy:
            library.drop_rows([item.picture for item in held])
            library.flush(edit)
    return [to for _, to in moves]


def _with_belongings(library: Library, items: Sequence[Item]) -> list[Path]:
    paths: dict[Path, None] = {}
    for item in items:
        if item.picture in library.shared:
            raise UserError(
                "another picture has the same name with another ending, and so the same caption file",
                where=str(item.picture),
                fix="rename one of them",
            )
        paths |= dict.fromkeys([item.picture, *library.belongings(item)])
    return list(paths)


def _rows_of(table: CaptionTable, held: Sequence[Item]) -> bytes:
    pictures = {item.picture for item in held}
    rows = table.rows
    table.rows = [row for row in rows if row.picture in pictures]
    content = table.content()
    table.rows = rows
    return content
