"""The index says where every sample lies, and nothing damaged gets into it."""

import contextlib
import io
import random
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_sets import sample, write_pairs, write_tar

from pacl_scale.data.index import INDEX_NAME, SampleIndex, build_index, hash_key, list_shards
from pacl_scale.data.sample import read_sample
from pacl_scale.data.tar import DamagedTar, read_members, scan_tar, split_name
from pacl_scale.errors import UserError


def tar_bytes(members: list[tuple[str, bytes]], format: int) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1.5  # pax keeps the half second in a header of its own
            tar.addfile(info, io.BytesIO(data))
    return content.getvalue()


LONG = "folder/" + "n" * 180

MEMBERS = [
    ("a/0001.jpg", b"x" * 700),
    ("a/0001.txt", b"caption"),
    (f"{LONG}.jpg", b"y" * 512),
    (f"{LONG}.txt", b""),
    ("b.c/0002.seg.PNG", b"z" * 3),
]


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_samples_lie_where_the_scan_says(format: int) -> None:
    content = tar_bytes(MEMBERS, format)
    samples = scan_tar(io.BytesIO(content), "x.tar")
    assert [s.key for s in samples] == ["a/0001", LONG, "b.c/0002"]
    assert [s.extensions for s in samples] == [("jpg", "txt"), ("jpg", "txt"), ("seg.png",)]
    assert samples[0].offset == 0
    assert samples[1].offset == samples[0].length
    for one, wanted in zip(samples, (MEMBERS[:2], MEMBERS[2:4], MEMBERS[4:]), strict=True):
        key, members = read_sample(content[one.offset : one.offset + one.length])
        assert key == one.key
        assert [bytes(m) for m in members.values()] == [data for _, data in wanted]


def test_folders_and_links_are_no_members() -> None:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for name, type in (("a", tarfile.DIRTYPE), ("a/link.jpg", tarfile.SYMTYPE), ("a/1.jpg", tarfile.REGTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = type, "/etc/passwd"
            tar.addfile(info, io.BytesIO())
    content.seek(0)
    assert [member.name for member in read_members(content, "x.tar")] == ["a/1.jpg"]


def test_webdataset_keys() -> None:
    assert split_name("a.b/0001.seg.PNG") == ("a.b/0001", "seg.png")
    assert split_name("0001.jpg") == ("0001", "jpg")


def test_a_tar_cut_anywhere_is_damaged() -> None:
    whole = tar_bytes(MEMBERS, tarfile.PAX_FORMAT)
    end = scan_tar(io.BytesIO(whole), "x.tar")[-1]
    for cut in [*range(0, end.offset + end.length + 1024, 256)]:
        with pytest.raises(DamagedTar, match=r"x\.tar is damaged at byte [\d,]+: "):
            scan_tar(io.BytesIO(whole[:cut]), "x.tar")


def test_a_changed_header_is_damage() -> None:
    whole = bytearray(tar_bytes(MEMBERS, tarfile.GNU_FORMAT))
    second = next(s for s in scan_tar(io.BytesIO(whole), "x.tar") if s.offset).offset
    whole[second + 3] ^= 1
    with pytest.raises(DamagedTar, match=f"at byte {second:,}: a header whose checksum does not match"):
        scan_tar(io.BytesIO(whole), "x.tar")


def test_a_negative_size_is_damage() -> None:
    """It would lead back to where the member began, for ever."""
    whole = bytearray(tar_bytes([("a.jpg", b"x")], tarfile.GNU_FORMAT))
    whole[124:136], whole[148:156] = b"-0000001130\0", b"        "
    whole[148:156] = b"%06o\0 " % sum(whole[:512])
    with pytest.raises(DamagedTar, match="a negative number"):
        scan_tar(io.BytesIO(whole), "x.tar")
    with pytest.raises(DamagedTar, match="a negative number"):
        read_sample(bytes(whole[:1024]))


def test_data_after_the_end_is_damage() -> None:
    whole = tar_bytes(MEMBERS, tarfile.GNU_FORMAT)
    with pytest.raises(DamagedTar, match="data follows"):
        scan_tar(io.BytesIO(whole + whole), "x.tar")


def test_noise_never_makes_the_scan_fail_otherwise() -> None:
    whole, rng = tar_bytes(MEMBERS, tarfile.PAX_FORMAT), random.Random(0)
    for _ in range(300):
        noisy = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            noisy[rng.randrange(len(noisy))] = rng.randrange(256)
        with contextlib.suppress(DamagedTar):
            scan_tar(io.BytesIO(noisy), "x.tar")


def test_index_survives_saving_and_loading(tmp_path: Path) -> None:
    built = write_pairs(tmp_path, [3, 1, 4])
    loaded = SampleIndex.load(str(tmp_path))
    assert [(s.name, s.samples) for s in loaded.shards] == [("00000.tar", 3), ("00001.tar", 1), ("00002.tar", 4)]
    assert [s.size for s in loaded.shards] == [(tmp_path / s.name).stat().st_size for s in loaded.shards]
    for name in ("shard", "offset", "length", "key"):
        assert np.array_equal(getattr(built, name), getattr(loaded, name))
        assert getattr(built, name).dtype == getattr(loaded, name).dtype
    assert loaded.key[4] == hash_key("0000004")


def test_samples_without_picture_or_caption_are_counted(tmp_path: Path) -> None:
    bad = [sample(1, jpg=None), sample(2, txt=None, json=None), sample(3, jpg=None, txt=None)]
    write_tar(tmp_path / "0.tar", [sample(0), *bad])
    index = build_index(str(tmp_path), extra={"a": 1})
    assert len(index) == 1
    assert SampleIndex.load(str(tmp_path)).left_out == {"no picture": 2, "no caption": 1}
    assert SampleIndex.load(str(tmp_path)).extra == {"a": 1}


def test_shard_with_no_usable_sample_is_an_error(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [sample(0)])
    write_tar(tmp_path / "1.tar", [sample(1, jpg=None), sample(2, jpg=None)])
    with pytest.raises(UserError, match=r"1\.tar holds no usable sample: 2 with no picture"):
        build_index(str(tmp_path))
    assert list_shards(str(tmp_path)) == ["0.tar", "1.tar"]
    assert not (tmp_path / INDEX_NAME).exists()


def test_an_empty_shard_is_kept_and_an_empty_set_is_not(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [])
    with pytest.raises(UserError, match="holds no usable sample: each of its 1 tars is empty"):
        build_index(str(tmp_path))
    write_tar(tmp_path / "1.tar", [sample(0)])
    assert [shard.samples for shard in build_index(str(tmp_path)).shards] == [0, 1]


@pytest.mark.parametrize("content", [b"", b"PAR1 no parquet PAR1"])
def test_what_is_no_index_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / INDEX_NAME).write_bytes(content)
    with pytest.raises(UserError, match=r"index\.parquet cannot be used as an index .* run the index step again"):
        SampleIndex.load(str(tmp_path))


def test_noise_in_an_index_is_a_sentence_or_changes_nothing(tmp_path: Path) -> None:
    whole = write_pairs(tmp_path, [300, 20])
    path, rng = tmp_path / INDEX_NAME, random.Random(0)
    content, refused = path.read_bytes(), 0
    for _ in range(200):
        noisy = bytearray(content)
        for _ in range(rng.randrange(1, 4)):
            noisy[rng.randrange(len(noisy))] = rng.randrange(256)
        path.write_bytes(noisy)
        try:
            index = SampleIndex.load(str(tmp_path))
        except UserError as error:
            assert "cannot be used as an index" in str(error)
            refused += 1
            continue
        assert all(np.array_equal(getattr(index, name), getattr(whole, name)) for name in ("offset", "length", "key"))
        assert (index.shards, index.kind, index.extra) == (whole.shards, whole.kind, whole.extra)
    assert 100 < refused < 200
    # Noise seldom meets the few bytes that name the shards.
    path.write_bytes(content.replace(b"00001.tar", b"00007.tar"))
    with pytest.raises(UserError, match="its metadata is damaged"):
        SampleIndex.load(str(tmp_path))


def test_missing_index_and_missing_tars(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no index\.parquet; run the index step"):
        SampleIndex.load(str(tmp_path))
    with pytest.raises(UserError, match="holds no tars to index"):
        build_index(str(tmp_path))
    with pytest.raises(UserError, match="no such file"):
        build_index(str(tmp_path / "nowhere"))


def test_an_index_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    index = write_pairs(tmp_path, [3])
    index.length[-1] += 1 << 20
    index.save()
    with pytest.raises(UserError, match="beyond the end of its shard"):
        SampleIndex.load(str(tmp_path))


def test_loading_imports_no_pandas(tmp_path: Path) -> None:
    """pyarrow's own conversions would, and that takes longer than reading an index of 30 million samples."""
    write_pairs(tmp_path, [3])
    code = "import sys; from pacl_scale.data.index import SampleIndex; SampleIndex.load(sys.argv[1]).key.sum(); "
    code += "sys.exit('pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=60).returncode == 0


def test_a_column_of_another_type_or_with_gaps_is_refused(tmp_path: Path) -> None:
    write_pairs(tmp_path, [3])
    path = tmp_path / INDEX_NAME
    table = pq.read_table(path)
    for column in (pa.array([0, 1, None], pa.uint64()), pa.array([0, 1, 2], pa.int32())):
        place = table.schema.get_field_index("offset")
        pq.write_table(table.set_column(place, "offset", column), path)
        with pytest.raises(UserError, match="without gaps is expected"):
            SampleIndex.load(str(tmp_path))
