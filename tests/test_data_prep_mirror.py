"""Tars that somebody else made: read to their end, indexed where they lie, damaged ones named and left out."""

import hashlib
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from web_farm import draw, encoded

from data_prep.decontaminate import perceptual_hash
from data_prep.download import main
from data_prep.mirror import check_foreign_tar
from pacl_scale import storage
from pacl_scale.data.index import SampleIndex, hash_key
from pacl_scale.data.tar import DamagedTar

ROOT = Path(__file__).resolve().parents[1]


def tar_of(members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def sample(number: int, caption: str = "a dog") -> dict[str, bytes]:
    return {f"{number:05d}.jpg": encoded(draw(number)), f"{number:05d}.txt": caption.encode()}


def write_mirror(root: str) -> dict[str, bytes]:
    """A sound tar, one with samples that cannot be used, and one that is cut short."""
    mixed = {
        **sample(10),
        "00011.png": encoded(draw(11), "PNG"),
        "00011.json": b'{"caption": "a cat on a chair"}',
        "00012.jpg": b"no picture at all",
        "00012.txt": b"a dog",
        "00013.jpg": encoded(draw(13)),
        "00013.txt": b"  ",
        "00014.cls": b"7",
    }
    tars = {
        "0000.tar": tar_of({name: content for number in range(3) for name, content in sample(number).items()}),
        "0001.tar": tar_of(mixed),
        "0002.tar": tar_of(sample(20))[:4000],
    }
    for name, content in tars.items():
        storage.write_bytes(f"{root}/{name}", content)
    return tars


@pytest.mark.s3
@pytest.mark.parametrize("place", ["local", "s3"])
def test_a_mirror_is_verified_and_indexed(
    place: str, tmp_path: Path, s3_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = str(tmp_path / "set") if place == "local" else s3_url
    tars = write_mirror(root)
    assert main(["mirror", f"output={root}"]) == 1
    out, error = capsys.readouterr()
    assert "1 tars are damaged and not in the index: 0002.tar" in error and "5 samples indexed" in out
    report = json.loads(storage.read_bytes(f"{root}/report.json"))
    assert (report["got"], report["expected"]) == (5, 8)
    assert report["failures"] == {"not_an_image": 1, "no caption": 1, "no picture": 1}
    assert list(report["left_aside"]) == ["0002.tar"]
    assert report["survey"]["caption_length"]["counts"][:2] == [4, 1]
    assert "damaged" in storage.read_bytes(f"{root}/report.html").decode()
    assert {name: storage.read_bytes(f"{root}/{name}") for name in tars} == tars
    # The damaged tar comes again; the others are not read a second time.
    storage.write_bytes(f"{root}/0002.tar", tar_of(sample(20)))
    index = json.loads(storage.read_bytes(f"{root}/mirror.json"))
    index["0000.tar"]["sha256"] = "noted before"
    storage.write_bytes(f"{root}/mirror.json", json.dumps(index).encode())
    assert main(["mirror", f"output={root}"]) == 0
    report = json.loads(storage.read_bytes(f"{root}/report.json"))
    assert (report["got"], report["left_aside"]) == (6, {})
    assert report["verified"]["0000.tar"] == "noted before"
    assert [shard.name for shard in SampleIndex.load(root).shards] == list(tars)
    assert main(["verify", "mirror", f"output={root}"]) == 0
    report = json.loads(storage.read_bytes(f"{root}/report.json"))
    assert len(report["verified"]["0000.tar"]) == 64
    assert main(["mirror", f"output={root}", "expect.rows=10"]) == 2
    assert "has 9 rows where expect.rows is 10" in capsys.readouterr().err


def test_evaluation_pictures_are_left_out_of_a_mirror(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As the same file and as a resized copy; other lists mean that every tar is looked at again."""
    (tmp_path / "set").mkdir()
    for tar in range(2):
        members = {name: content for n in range(3) for name, content in sample(3 * tar + n).items()}
        (tmp_path / f"set/{tar:04d}.tar").write_bytes(tar_of(members))
    same, near = encoded(draw(1)), perceptual_hash(encoded(draw(5).resize((480, 320)), quality=60))
    (tmp_path / "one.txt").write_text(f"sha256:{hashlib.sha256(same).hexdigest()}\n")
    (tmp_path / "other.txt").write_text(f"phash:{near:016x}\n")
    keys = {}
    for name in ("one", "other"):
        assert main(["mirror", f"output={tmp_path / 'set'}", f"fetch.exclude=[{tmp_path / name}.txt]"]) == 0
        report = json.loads((tmp_path / "set/report.json").read_text())
        assert (report["got"], report["failures"]) == (5, {"evaluation_picture": 1})
        keys[name] = set(SampleIndex.load(str(tmp_path / "set")).key.tolist())
    assert keys["one"] ^ keys["other"] == {hash_key("00001"), hash_key("00005")}
    assert main(["mirror", f"output={tmp_path / 'set'}"]) == 0
    assert len(SampleIndex.load(str(tmp_path / "set"))) == 6
    (tmp_path / "set/mirror.json").write_text('{"0000.tar": {"byte": 1}}')
    capsys.readouterr()
    assert main(["mirror", f"output={tmp_path / 'set'}"]) == 2
    assert "mirror.json is damaged" in capsys.readouterr().err


def test_tars_of_img2dataset_are_held_against_their_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "00000.tar").write_bytes(tar_of(sample(1)))
    (tmp_path / "00001.tar").write_bytes(tar_of(sample(2)))
    (tmp_path / "00000_stats.json").write_text('{"successes": 2}')
    (tmp_path / "00001_stats.json").write_text('{"successes": 1}')
    assert main(["mirror", f"output={tmp_path}"]) == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["left_aside"] == {"00000.tar": "it holds 1 samples where its counts say 2"}
    assert [shard.name for shard in SampleIndex.load(str(tmp_path)).shards] == ["00001.tar"]


def test_a_header_behind_a_long_profile_is_found() -> None:
    picture = encoded(draw(1), icc_profile=b"x" * 100_000)
    note = check_foreign_tar(io.BytesIO(tar_of({"1.jpg": picture, "1.txt": b"a dog"})), "x.tar")
    assert (note.samples, note.causes, sum(note.sides)) == (1, {}, 1)


def test_a_flipped_bit_in_a_header_is_damage() -> None:
    content = bytearray(tar_of(sample(1)))
    content[100] ^= 0xFF
    with pytest.raises(DamagedTar):
        check_foreign_tar(io.BytesIO(bytes(content)), "x.tar")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "holds no tars"),
        (["parts=2"], "not cut into parts"),
        ([f"expect.sha256={'0' * 64}"], "a mirror has no list"),
        (["--slurm"], "--slurm queues downloads"),
    ],
)
def test_what_a_mirror_is_not(
    words: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["mirror", f"output={tmp_path}", *words]) == 2
    assert reason in capsys.readouterr().err
    for verb in ("prepare", "retry"):
        assert main([verb, "mirror", f"output={tmp_path}"]) == 2
    assert not list(tmp_path.iterdir())


# Uploads that a killed run left

UPLOAD = """
import sys
from data_prep import layout
layout.upload(sys.argv[1], sys.argv[2])
"""


@pytest.mark.s3
def test_unfinished_uploads_of_killed_runs_are_removed(s3_url: str, tmp_path: Path) -> None:
    """A real upload is killed in its middle; only the claimed part's shards of this data set are cleared."""
    import time

    import fsspec

    from data_prep.parts import WHOLE, Part
    from data_prep.uploads import abort_unfinished

    files = fsspec.filesystem("s3")
    bucket, prefix, _ = files.split_path(s3_url)
    with (tmp_path / "big").open("wb") as file:
        file.truncate(300 << 20)

    def unfinished() -> list[str]:
        page = files.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix)
        return sorted(upload["Key"].removeprefix(f"{prefix}/") for upload in page.get("Uploads", []))

    words = [sys.executable, "-c", UPLOAD, str(tmp_path / "big"), f"{s3_url}/00003.tar"]
    process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not unfinished():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    for name in ("00004.tar", "other.tar", "deeper/00005.tar", "index.parquet", "list/00001.parquet"):
        files.call_s3("create_multipart_upload", Bucket=bucket, Key=f"{prefix}/{name}")
    assert len(unfinished()) == 6 and not storage.exists(f"{s3_url}/00003.tar")
    assert abort_unfinished(s3_url, Part(1, 2)) == 1
    assert unfinished() == ["00004.tar", "deeper/00005.tar", "index.parquet", "list/00001.parquet", "other.tar"]
    assert abort_unfinished(s3_url, WHOLE) == 3
    assert unfinished() == ["deeper/00005.tar", "other.tar"]
    assert abort_unfinished(s3_url, WHOLE) == 0


def test_half_copies_on_a_disk_are_removed(tmp_path: Path) -> None:
    from data_prep.parts import WHOLE, Part
    from data_prep.uploads import abort_unfinished

    (tmp_path / "list").mkdir()
    names = ["00003.tar.1a2b3c4d.part", "00002_stats.json.00000000.part", "notes.part", "00001.tar"]
    for name in [*names, "index.parquet.00000000.part", "list/plan.json.00000000.part", "list/mine.part"]:
        (tmp_path / name).touch()
    assert abort_unfinished(str(tmp_path), Part(0, 2)) == 1
    assert abort_unfinished(str(tmp_path), WHOLE) == 3
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert left == ["00001.tar", "list/mine.part", "notes.part"]
