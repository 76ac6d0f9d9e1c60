"""Archives and shards: read in place, member by member, and never out of them."""

from __future__ import annotations

import struct
import tarfile
import zipfile
from pathlib import Path

import pytest
from data_helpers import captioned
from source_helpers import BLUE, RED, captions, colours, found, notices, png, problems, tar

from gesso.data import places
from gesso.data.places import Place
from gesso.data.sources import archive
from gesso.errors import UserError

SET = {"a.png": png("red"), "a.txt": b"r", "dog/b.png": png("blue"), "dog/b.txt": b"b"}


def pack(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return path


def any_archive(folder: Path, kind: str, members: dict[str, bytes]) -> Path:
    if kind == "zip":
        return pack(folder / "x.zip", members)
    mode = {"tar": "w", "tar.gz": "w:gz", "tgz": "w:gz", "tar.bz2": "w:bz2", "tar.xz": "w:xz"}[kind]
    return tar(folder / f"x.{kind}", members, mode=mode)


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz", "tgz", "tar.bz2", "tar.xz"])
class TestEveryKind:
    def test_side_files_and_concepts(self, tmp_path: Path, kind: str) -> None:
        rows = found(any_archive(tmp_path, kind, SET))
        assert colours(rows) == {"r": RED, "b": BLUE}
        assert {r.caption: r.concept for r in rows} == {"r": "", "b": "dog"}

    def test_a_table_in_the_one_folder_that_all_lie_in(self, tmp_path: Path, kind: str) -> None:
        members = {"set/metadata.csv": b"file_name,text\nb/x.png,said\n", "set/b/x.png": png(), "__MACOSX/._x.png": b""}
        assert captions(found(any_archive(tmp_path, kind, members))) == {"x.png": "said"}

    def test_a_kohya_tree(self, tmp_path: Path, kind: str) -> None:
        members = {"img/5_dog/a.png": png(), "img/5_dog/a.txt": b"x"}
        [record] = found(any_archive(tmp_path, kind, members))
        assert (record.repeats, record.concept) == (5.0, "dog")
        [record] = found(any_archive(tmp_path, kind, {"5_dog/a.png": png(), "5_dog/a.txt": b"x"}))
        assert (record.repeats, record.concept) == (5.0, "dog")

    def test_masks(self, tmp_path: Path, kind: str) -> None:
        members = {"a.png": png(), "a.txt": b"x", "a-masklabel.png": png("white")}
        [record] = found(any_archive(tmp_path, kind, members), mask="file")
        assert record.mask is not None
        assert record.mask.read() == png("white")

    @pytest.mark.parametrize("name", ["../a.png", "/etc/a.png", "x/../../a.png", "..\\a.png", "C:\\a.png"])
    def test_names_that_lead_out_are_refused(self, tmp_path: Path, kind: str, name: str) -> None:
        message = problems(any_archive(tmp_path, kind, SET | {name: png()}))
        assert "leads out of the archive" in message

    def test_problems_name_archive_and_member(self, tmp_path: Path, kind: str) -> None:
        path = any_archive(tmp_path, kind, {"a.png": png(), "a.txt": b"caf\xe9", "b.png": png()})
        message = problems(path)
        assert f"{path}::a.txt:1: the text is not UTF-8" in message
        assert f"1 of 1 picture has no caption: {path}::b.txt" in message

    def test_a_damaged_archive_is_named(self, tmp_path: Path, kind: str) -> None:
        path = any_archive(tmp_path, kind, SET)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
        assert f"{path}: no {'ZIP' if kind == 'zip' else 'TAR'} archive, or a damaged one" in problems(path)

    def test_hidden_pictures_are_told_and_those_of_programs_are_not(self, tmp_path: Path, kind: str) -> None:
        path = any_archive(tmp_path, kind, SET | {".old/x.png": png(), "__MACOSX/._a.png": b"", "dog/._b.png": b""})
        assert f"{path}: hidden, not read: .old/ (1)" in notices(path)

    def test_an_archive_in_it_is_to_be_unpacked(self, tmp_path: Path, kind: str) -> None:
        message = problems(any_archive(tmp_path, kind, {"in.zip": b"PK", "readme.md": b"x"}))
        assert "found: 1 .md, 1 .zip" in message
        assert "unpack it: archives in an archive are not read (in.zip)" in message

    def test_without_pictures(self, tmp_path: Path, kind: str) -> None:
        message = problems(any_archive(tmp_path, kind, {"a/readme.md": b"x", "b.heic": b"x"}))
        assert "no pictures found" in message
        assert "found: 1 .heic, 1 .md" in message


class TestZip:
    def test_members_that_are_encrypted_are_named(self, tmp_path: Path) -> None:
        path = pack(tmp_path / "x.zip", SET)
        data = bytearray(path.read_bytes())
        at = data.index(b"PK\x01\x02")
        data[at + 8] |= 1  # the flag that says that a password is needed
        path.write_bytes(data)
        assert "encrypted, so not readable: a.png" in problems(path)

    def test_a_bomb_is_refused_by_its_declared_size(self, tmp_path: Path) -> None:
        path = pack(tmp_path / "x.zip", SET)
        data = bytearray(path.read_bytes())
        at = data.index(b"PK\x01\x02")
        data[at + 24 : at + 28] = struct.pack("<I", archive.MAX_MEMBER + 1)
        path.write_bytes(data)
        assert f"{path}::a.png: it says that it unpacks to 512 MiB" in problems(path)

    def test_a_member_that_is_damaged_is_named_when_it_is_read(self, tmp_path: Path) -> None:
        path = pack(tmp_path / "x.zip", SET, zipfile.ZIP_STORED)
        data = path.read_bytes()
        at = data.index(png("red"))
        path.write_bytes(data[: at + 40] + b"XXXX" + data[at + 44 :])
        [record] = [r for r in found(path) if r.caption == "r"]
        with pytest.raises(UserError, match=r"x\.zip::a\.png: cannot be read: Bad CRC-32"):
            record.place.read()

    def test_names_that_come_twice_are_refused(self, tmp_path: Path) -> None:
        path = pack(tmp_path / "x.zip", SET)
        with zipfile.ZipFile(path, "a") as file, pytest.warns(UserWarning, match="Duplicate"):
            file.writestr("a.png", png("blue"))
        assert "several members of one name: a.png" in problems(path)

    def test_an_archive_without_the_usual_ending(self, tmp_path: Path) -> None:
        assert colours(found(pack(tmp_path / "set.cbz", SET))) == {"r": RED, "b": BLUE}
        assert colours(found(tar(tmp_path / "set", SET))) == {"r": RED, "b": BLUE}

    def test_a_new_archive_under_the_name_is_read_anew(self, tmp_path: Path) -> None:
        path = pack(tmp_path / "x.zip", SET)
        assert colours(found(path))["r"] == RED
        pack(path, SET | {"a.png": png("blue", (9, 9))})
        assert colours(found(path))["r"] == BLUE


class TestTar:
    def test_links_are_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "x.tar"
        with tarfile.open(path, "w") as file:
            link = tarfile.TarInfo("a.png")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            file.addfile(link)
        assert f"{path}::a.png: a link in an archive" in problems(path)

    def test_a_listed_link_is_one_problem(self, tmp_path: Path) -> None:
        path = tar(
            tmp_path / "x.tar", {"set/b/b.png": png(), "set/metadata.csv": b"file_name,text\nb/b.png,b\na.png,a\n"}
        )
        with tarfile.open(path, "a") as file:
            link = tarfile.TarInfo("set/a.png")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            file.addfile(link)
        message = problems(path)
        assert message.startswith("1 problem found")
        assert f"{path}::set/a.png: a link in an archive" in message

    def test_a_damaged_header_in_the_middle_is_found(self, tmp_path: Path) -> None:
        path = tar(tmp_path / "x.tar", SET)
        data = bytearray(path.read_bytes())
        at = data.index(b"dog/b.png")
        data[at + 100] ^= 0xFF
        path.write_bytes(data)
        assert f"a damaged header at byte {at}" in problems(path)

    def test_a_compressed_one_has_a_size_up_to_which_it_is_read(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(places, "MAX_PACKED", 30_000)
        path = tar(tmp_path / "x.tar.gz", {"a.png": png(), "a.txt": b"x" * 9_000}, mode="w:gz")
        assert len(found(path)) == 1
        path = tar(tmp_path / "y.tar.gz", {"a.png": png(), "a.txt": b"x", "b.bin": b"x" * 40_000}, mode="w:gz")
        assert "decompress it to a plain .tar" in problems(path)

    def test_a_stretch_beyond_the_end_is_named(self, tmp_path: Path) -> None:
        path = tar(tmp_path / "x.tar", SET)
        with pytest.raises(UserError, match=r"x\.tar::a\.png: cannot be read: the archive ends within it"):
            Place(str(path), "stretch", "a.png", path.stat().st_size - 5, 10).read()


class TestShards:
    def shards(self, folder: Path, count: int = 3) -> Path:
        for i in range(count):
            members = {}
            for j in range(2):
                key = f"{i}{j}"
                members |= {f"{key}.png": png("red" if j else "blue"), f"{key}.txt": key.encode()}
            tar(folder / f"set-{i:03}.tar", members)
        return folder

    def test_a_pattern_names_shards_of_which_only_offsets_are_kept(self, tmp_path: Path) -> None:
        self.shards(tmp_path)
        rows = found(f"{tmp_path}/set-{{000..002}}.tar")
        assert colours(rows) == {f"{i}{j}": RED if j else BLUE for i in range(3) for j in range(2)}
        assert {r.place.kind for r in rows} == {"stretch"}
        assert sorted(p.name for p in tmp_path.iterdir()) == ["set-000.tar", "set-001.tar", "set-002.tar"]

    @pytest.mark.parametrize(
        ("pattern", "count"),
        [("set-{000..001}.tar", 4), ("set-{000,002}.tar", 4), ("set-00{0..2}.tar", 6), ("{set,}-000.tar", None)],
    )
    def test_patterns(self, tmp_path: Path, pattern: str, count: int | None) -> None:
        self.shards(tmp_path)
        if count is None:
            assert f"{tmp_path}/-000.tar" in problems(f"{tmp_path}/{pattern}")
        else:
            assert len(found(f"{tmp_path}/{pattern}")) == count

    def test_missing_shards_are_each_named(self, tmp_path: Path) -> None:
        self.shards(tmp_path)
        message = problems(f"{tmp_path}/set-{{000..004}}.tar")
        assert f"{tmp_path}/set-003.tar" in message
        assert f"{tmp_path}/set-004.tar" in message
        assert "set-002.tar" not in message

    @pytest.mark.parametrize("bad", ["{5..1}", "{x}", "{0..99999999}", "{000..999}{000..999}"])
    def test_patterns_that_are_none(self, tmp_path: Path, bad: str) -> None:
        message = problems(f"{tmp_path}/set-{bad}.tar")
        assert "range" in message or "shards, more than" in message

    def test_a_folder_of_shards(self, tmp_path: Path) -> None:
        assert len(found(self.shards(tmp_path))) == 6
        for name in ("train-0.tar", "val-0.tar"):
            tar(tmp_path / "split" / name, {"k.png": png(), "k.txt": name.encode()})
        assert [r.caption for r in found(tmp_path / "split", split="validation")] == ["val-0.tar"]

    def test_one_shard_with_captions_of_two_kinds(self, tmp_path: Path) -> None:
        members = {"0.png": png(), "0.json": b'{"caption": "j"}', "0.txt": b"t", "0.seg.png": png(), "0.cls": b"3"}
        path = tar(tmp_path / "x.tar", members)
        assert [r.caption for r in found(path)] == ["t"]
        assert [r.caption for r in found(path, caption_extension="json")] == ["j"]
        text = notices(path)
        assert f"several captions under one key, of which the first is read: {path}::0 (.json, .txt)" in text
        assert f"1 member not used: {path}::0.seg.png" in text

    def test_concepts_captions_and_pictures_by_key(self, tmp_path: Path) -> None:
        path = tar(tmp_path / "x.tar", {"./cat/0.png": png(), "./cat/0.txt": b"x", "lone.txt": b"y"})
        [record] = found(path, layout="webdataset")
        assert record.concept == "cat"
        assert "lone.txt" in notices(path, layout="webdataset")
        path = tar(tmp_path / "y.tar", {"0.png": png(), "0.jpg": png(), "0.txt": b"x", "1.png": png()})
        message = problems(path, layout="webdataset")
        assert "several pictures under one key: 0 (.jpg, .png)" in message
        assert f"{path}::1.txt" in message

    def test_names_with_dots_are_read_as_a_folder_if_keys_do_not_pair_up(self, tmp_path: Path) -> None:
        path = tar(tmp_path / "x.tar", {"a.1.png": png(), "a.1.txt": b"one", "a.2.png": png(), "a.2.txt": b"two"})
        assert captions(found(path)) == {"a.1.png": "one", "a.2.png": "two"}

    def test_masks_in_shards(self, tmp_path: Path) -> None:
        members = {"0.png": png(), "0.txt": b"x", "0-masklabel.png": png("white")}
        for name in ("0.tar", "1.tar"):
            tar(tmp_path / name, members)
        rows = found(tmp_path, mask="file")
        assert [r.mask and r.mask.url for r in rows] == [str(tmp_path / "0.tar"), str(tmp_path / "1.tar")]

    def test_compressed_shards_are_refused(self, tmp_path: Path) -> None:
        tar(tmp_path / "0.tar.gz", SET, mode="w:gz")
        assert "compressed shards have no random access" in problems(f"{tmp_path}/{{0,1}}.tar.gz")

    def test_a_layout_that_an_archive_cannot_have(self, tmp_path: Path) -> None:
        assert "unpack it and name the folder" in problems(pack(tmp_path / "x.zip", SET), layout="webdataset")


def test_archives_beside_pictures_are_left_alone(tmp_path: Path) -> None:
    captioned(tmp_path, "a.png", "one")
    tar(tmp_path / "x.tar", SET)
    assert captions(found(tmp_path)) == {"a.png": "one"}
    assert "archives beside the pictures are not read: x.tar" in notices(tmp_path)
