"""`clipgen generate`: its output, its files, and receipts that generate an image again."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from cli_kit import QUICK, Run, records
from PIL import Image

from clipgen.images.pixels import save_image
from clipgen.outputs.metadata import Receipt


def pixels(path: str) -> bytes:
    return Image.open(path).tobytes()


def test_generate_writes_images_and_grid_and_prints_seed_scores_and_time(run: Run) -> None:
    result = run("generate", "Sketch of a lemon", *QUICK)
    assert result.exit_code == 0, result.output
    names = sorted(path.name for path in Path("outputs").iterdir())
    assert names == [f"sketch-of-a-lemon-7-{end}.png" for end in ("1", "2", "grid")]
    for name in names:
        assert f"outputs/{name}" in result.stdout
    assert re.search(r"Sketch of a lemon: seed 7, \d+\.\d s\n", result.stdout)
    assert len(re.findall(r"CLIP score -?\d\.\d{3}", result.stdout)) == 2
    assert Image.open(f"outputs/{names[0]}").size == (32, 32)
    assert Image.open(f"outputs/{names[2]}").width > 64
    assert "loaded" in result.stderr and "drew 1 of 1 prompts" in result.stderr


def test_json_option_prints_only_json_on_stdout(run: Run) -> None:
    (record,) = records(run("generate", "a lemon", *QUICK, "--json"))
    assert record["prompt"] == "a lemon" and record["seed"] == 7 and record["seconds"] > 0
    assert record["clip_scores"] == sorted(record["clip_scores"], reverse=True)
    assert len(record["files"]) == len(record["clip_scores"]) == len(record["seeds"]) == 2
    assert all(Path(file).is_file() for file in [*record["files"], record["grid"]])


def test_receipt_in_a_file_generates_the_same_image_again(run: Run) -> None:
    (record,) = records(run("generate", "a zitrone ü", *QUICK, "--top-k", "5", "--json"))
    receipt = Receipt.from_file(record["files"][1])
    assert (receipt.text, receipt.seed, receipt.image_seed) == ("a zitrone ü", 7, record["seeds"][1])
    assert (receipt.candidates, receipt.guidance, receipt.top_k, receipt.top_p) == (4, 2.0, 5, 0.95)
    again = ("--seed", receipt.image_seed, "--candidates", 1, "--num-outputs", 1, "--top-k", 5, "--json")
    (redrawn,) = records(run("generate", "a zitrone ü", *QUICK, *again))
    assert pixels(redrawn["files"][0]) == pixels(record["files"][1])
    assert redrawn["grid"] is None


def test_prompt_gives_the_same_images_alone_and_among_others(run: Run) -> None:
    Path("prompts.txt").write_text("\ufeffa red heart\n\n  a dog  \r\n", encoding="utf-8")
    many = records(run("generate", "a lemon", "--prompts-file", "prompts.txt", *QUICK, "--json"))
    assert [record["prompt"] for record in many] == ["a lemon", "a red heart", "a dog"]
    assert {record["seed"] for record in many} == {7}
    (alone,) = records(run("generate", "a dog", *QUICK, "--json", "--out", "alone"))
    assert alone["seeds"] == many[2]["seeds"]
    assert [pixels(file) for file in alone["files"]] == [pixels(file) for file in many[2]["files"]]


def test_run_without_a_seed_uses_one_random_seed(run: Run) -> None:
    few = ("--num-outputs", 1, "--candidates", 1, "--json")
    first, second = (records(run("generate", "a", "b", *few)) for _ in range(2))
    assert first[0]["seed"] == first[1]["seed"] != second[0]["seed"]


def test_more_prompts_than_fit_a_batch_are_generated_in_order(run: Run) -> None:
    many = records(run("generate", *"abcde", "--num-outputs", 1, "--candidates", 40, "--seed", 0, "--json"))
    assert [record["prompt"] for record in many] == list("abcde")
    assert all(record["seed"] == 0 for record in many)


def test_prompts_file_dash_reads_stdin(run: Run) -> None:
    result = run("generate", "--prompts-file", "-", *QUICK, "--json", input="a lemon\na dog\n")
    assert [record["prompt"] for record in records(result)] == ["a lemon", "a dog"]


def test_image_alone_mixed_and_prompt_alone_give_different_images(run: Run, photo: Path) -> None:
    (alone,) = records(run("generate", "--image", photo, *QUICK, "--json"))
    (mixed,) = records(run("generate", "a lemon", "--image", photo, *QUICK, "--json"))
    (words,) = records(run("generate", "a lemon", *QUICK, "--json"))
    assert alone["prompt"] == "" and "my-photo-7-1.png" in alone["files"][0]
    assert len({tuple(record["clip_scores"]) for record in (alone, mixed, words)}) == 3


@pytest.mark.parametrize(("suffix", "format"), [("png", "PNG"), ("webp", "WEBP"), ("jpg", "JPEG")])
def test_format_option_sets_the_format_of_every_file(run: Run, suffix: str, format: str) -> None:
    (record,) = records(run("generate", "a lemon", *QUICK, "--format", suffix, "--json"))
    assert {Image.open(file).format for file in [*record["files"], record["grid"]]} == {format}


def test_similar_prompts_overwrite_no_file(run: Run) -> None:
    similar = records(run("generate", "a lemon", "A lemon!", "a  lemon", *QUICK, "--json"))
    similar += records(run("generate", "a lemon", *QUICK, "--top-k", 1, "--json"))
    files = [file for record in similar for file in [*record["files"], record["grid"]]]
    assert len(set(files)) == len(files) == len(list(Path("outputs").iterdir())) == 12


def test_long_prompt_is_truncated_with_a_warning(run: Run) -> None:
    result = run("generate", " ".join(f"word{i}" for i in range(500)), *QUICK, "--json")
    assert len(records(result)) == 1
    assert "word499" in result.stderr and "not read" in result.stderr
    assert max(len(path.name.encode()) for path in Path("outputs").iterdir()) < 255


def test_prompt_after_two_dashes_may_start_with_a_dash(run: Run) -> None:
    (record,) = records(run("generate", *QUICK, "--json", "--", "--seed"))
    assert record["prompt"] == "--seed"


def test_mixed_texts_and_images_are_recorded_in_the_receipt(run: Run, photo: Path) -> None:
    plain, mixed = (
        records(run("generate", "a lemon", *QUICK, "--json", *more))[0] for more in ([], ["--mix", "a dog=0.5"])
    )
    assert Receipt.from_file(mixed["files"][0]).text == "a lemon + a dog (0.5)"
    assert mixed["clip_scores"] != plain["clip_scores"]
    more = ("--image", photo, "--image-weight", 0.25, "--mix", "a dog=0.5", "--mix", "green=-1")
    (all_of_it,) = records(run("generate", "a lemon", *QUICK, "--json", *more))
    receipt = Receipt.from_file(all_of_it["files"][0])
    assert (
        run("generate", "a", "--mix", "a=-1")
        .stderr.splitlines()[-1]
        .startswith("clipgen: prompt has parts that cancel")
    )
    assert receipt.text == "My Photo.png (0.25) + a lemon + a dog (0.5) + green (-1)"


def test_image_whose_name_is_not_utf8_is_drawn_from_and_named_in_every_format(run: Run, tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    try:
        Image.new("RGB", (20, 20), "red").save(tmp_path / name)
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    for suffix in ("png", "webp", "jpg"):
        (found,) = records(run("generate", *QUICK, "--json", "--image", tmp_path / name, "--format", suffix))
        assert Receipt.from_file(found["files"][0]).prompt[0].name.startswith("caf")


def test_weight_of_an_image_that_is_no_part_of_the_prompt_is_refused(run: Run, photo: Path) -> None:
    for flags in (["a lemon"], ["a lemon", "--image", photo, "--keep-rows", 2]):
        result = run("generate", *flags, "--image-weight", 0.5)
        assert result.exit_code == 2 and "--image-weight needs --image as a part of the prompt" in result.stderr


def test_keep_rows_keeps_the_top_of_the_image(run: Run, photo: Path) -> None:
    """The prompt describes the rows below; without one, the image does."""
    for prompt in (["a lemon"], []):
        keep = ("--image", photo, "--keep-rows", 3)
        (kept,) = records(run("generate", *prompt, *QUICK, "--json", *keep))
        receipt = Receipt.from_file(kept["files"][0])
        assert receipt.keep_rows == 3 and receipt.text == (prompt or ["My Photo.png"])[0]
        assert run("replay", kept["files"][0], "--image", photo).exit_code == 0


def test_previews_are_written_and_deleted_at_the_end(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[str, tuple[int, int]]] = []

    def save(image: Image.Image, path: Path, *more: Any, **named: Any) -> Path:
        written.append((path.name, image.size))
        return save_image(image, path, *more, **named)

    monkeypatch.setattr("clipgen.images.pixels.save_image", save)
    (record,) = records(run("generate", "a lemon", *QUICK, "--previews", 3, "--json"))
    previews = [size for name, size in written if name == "preview-7.png"]
    assert len(previews) == 3 and len(set(previews)) == 1 and previews[0][0] > previews[0][1]
    files = [Path(file).name for file in [*record["files"], record["grid"]]]
    assert sorted(path.name for path in Path("outputs").iterdir()) == sorted(files)


def test_negative_prompts_change_the_image_and_are_in_the_receipt(run: Run) -> None:
    keep_away = (["--negative", "green"], ["--negative", "green", "--negative", "a dog"])
    plain, one, two = (
        records(run("generate", "a lemon", *QUICK, "--json", *more))[0]["files"][0] for more in ([], *keep_away)
    )
    assert Receipt.from_file(one).text == "a lemon, not green"
    assert Receipt.from_file(two).text == "a lemon, not green + a dog"
    assert len({Image.open(file).tobytes() for file in (plain, one, two)}) == 3
    assert run("replay", two).exit_code == 0
