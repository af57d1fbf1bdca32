"""`python -m train.check`: its report, near-duplicates, and exit codes."""

from __future__ import annotations

import io
import json
import os
import random
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from image_files import encoded, photo, write_difficult_images
from PIL import Image

from train import check


@pytest.fixture
def nasty(tmp_path: Path) -> Path:
    return write_difficult_images(tmp_path)


def run_check(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["check", *map(str, arguments), "--workers", "1"])
    try:
        check.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_report_counts_unreadable_small_and_duplicate_images(
    nasty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (nasty / "again.png").write_bytes(encoded(photo(9, (200, 160)), "PNG"))  # PLAIN.JPEG, larger
    assert run_check(monkeypatch, nasty, "--out", tmp_path / "out", "--size", 64) == 0
    said = capsys.readouterr().out
    assert "15 images: 11 can be used, 4 cannot" in said and "are smaller than 64 px" in said
    assert "not used: 1 hidden files, 1 broken links, 1 .txt" in said
    assert "shorter side: 1 to 2500 px" in said and "text.jpg: is not an image" in said
    duplicates = (tmp_path / "out" / "duplicates.txt").read_text()
    assert "again.png" in duplicates and "PLAIN.JPEG" in duplicates
    assert len((tmp_path / "out" / "unreadable.txt").read_text().splitlines()) == 4
    assert len(json.loads((tmp_path / "out" / "report.json").read_text())["pictures"]) == 15
    assert Image.open(tmp_path / "out" / "contact.png").width > 300


def test_names_that_are_not_utf8_keep_their_bytes_in_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "photos", tmp_path / "out"
    folder.mkdir()
    for name, data in ((b"caf\xe9.png", b"broken"), (b"a\xff.png", encoded(photo(1), "PNG")), (b"b\n.png", b"")):
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_bytes(data)
    (folder / "copy.png").write_bytes(encoded(photo(1), "PNG"))
    assert run_check(monkeypatch, folder, "--out", out) == 0
    said = capsys.readouterr().out
    assert "caf\\xe9.png: is not an image" in said and said.encode()
    assert b"caf\xe9.png: is not" in (out / "unreadable.txt").read_bytes()
    assert b"a\xff.png\n" in (out / "duplicates.txt").read_bytes()
    assert len(json.loads((out / "report.json").read_text())["pictures"]) == 4


@pytest.mark.parametrize("out", ["", "check", "deep/er"])
def test_output_inside_the_data_is_refused_before_reading(
    out: str, nasty: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_check(monkeypatch, nasty, "--out", nasty / out) == 2
    caught = capsys.readouterr()
    assert "lies inside" in caught.err and len(caught.err.splitlines()) == 1 and not caught.out
    assert not (nasty / "check").exists()


def test_output_where_a_pattern_finds_images_is_refused(nasty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_check(monkeypatch, nasty / "**" / "*.png", "--out", nasty / "check") == 2


def test_images_are_read_on_as_many_cores_as_may_be_used(
    nasty: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CLIPGEN_THREADS", "3")
    workers: list[int] = []
    monkeypatch.setattr(check, "examine_all", lambda source, count: workers.append(count) or [])
    monkeypatch.setattr(sys, "argv", ["check", str(nasty)])
    with pytest.raises(SystemExit):
        check.main()
    assert workers == [3]


def test_output_that_cannot_be_written_is_refused_in_one_line(
    nasty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert run_check(monkeypatch, nasty, "--out", tmp_path / "file") == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("flag", ["--workers", "--size"])
def test_numbers_below_one_are_refused(flag: str, nasty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["check", str(nasty), flag, "0"])
    with pytest.raises(SystemExit) as stop:
        check.main()
    assert stop.value.code == 2


def test_check_of_unreadable_images_exits_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.png").write_bytes(b"broken")
    assert run_check(monkeypatch, tmp_path) == 1
    assert "no image can be read" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["", "missing"])
def test_check_of_a_folder_without_images_is_one_line_on_stderr_and_exit_code_2(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_check(monkeypatch, tmp_path / name) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and str(tmp_path / name) in err and err.count("\n") == 1


@given(st.lists(st.integers(0, 2**64 - 1), max_size=8), st.randoms(use_true_random=False))
def test_near_duplicates_equal_those_of_a_search_over_all_pairs(values: list[int], rng: random.Random) -> None:
    for value in values[:4]:
        flips = rng.sample(range(64), rng.randint(0, 5))
        values.append(value ^ sum(1 << bit for bit in flips))
    together = {
        frozenset((i, j))
        for i in range(len(values))
        for j in range(i)
        if (values[i] ^ values[j]).bit_count() <= check.ALIKE
    }
    groups = check.near_duplicates(values)
    place = {row: n for n, group in enumerate(groups) for row in group}
    assert all(place.get(i, -1) == place.get(j, -2) for i, j in map(tuple, together))
    assert set(place) == {row for pair in together for row in pair}


def test_hash_survives_resizing_and_compression_and_differs_between_images() -> None:
    hashes = [check.dhash(photo(seed, (320, 240))) for seed in range(20)]
    for seed, value in enumerate(hashes):
        again = Image.open(io.BytesIO(encoded(photo(seed, (200, 150)), "JPEG", quality=60)))
        assert (check.dhash(again) ^ value).bit_count() <= check.ALIKE
    pairs = [(a ^ b).bit_count() for i, a in enumerate(hashes) for b in hashes[:i]]
    assert min(pairs) > check.ALIKE
