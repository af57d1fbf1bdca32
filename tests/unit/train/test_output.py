"""Output folders of training scripts: allowed places, and locks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from clipgen.errors import OutputError
from train.loop.output import check_output, lock_output


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    for folder in ("d/deep", "elsewhere"):
        Path(folder).mkdir(parents=True)
    Path("link").symlink_to("d")
    Path("list.txt").write_text("d/a.png\n")
    return "d"


@pytest.mark.parametrize("data_argument", ["d", "./d", "link", "d/**/*.png", "d/*", "d/{a,b}.png", "d/deep/..", "."])
@pytest.mark.parametrize("out", ["d/run", "d/deep/run", "d", "elsewhere/../d/new/run", "link/run"])
@pytest.mark.usefixtures("data")
def test_output_where_data_is_searched_is_refused(data_argument: str, out: str) -> None:
    with pytest.raises(OutputError, match=r"--out .* lies inside the data, .*give an --out elsewhere"):
        check_output(data_argument, Path(out))


@pytest.mark.parametrize(
    ("data_argument", "out"),
    [
        ("d", "elsewhere/run"),
        ("d", "d2"),
        ("d/deep", "d/run"),
        ("d/{000..127}.tar", "d/run"),
        ("list.txt", "run"),
        ("http://example.com/d/{0..1}.tar", "d"),
        ("module:function=d", "d/run"),
        ("nowhere", "nowhere/run"),
    ],
)
@pytest.mark.usefixtures("data")
def test_output_elsewhere_is_accepted(data_argument: str, out: str) -> None:
    check_output(data_argument, Path(out))


@pytest.mark.usefixtures("data")
def test_output_inside_an_encoded_set_is_accepted() -> None:
    Path("d/index.json").write_text("{}")
    check_output("d", Path("d/gpt"))


def test_output_is_locked_by_the_main_process_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with lock_output(tmp_path):
        with pytest.raises(OutputError, match=f"is being written by process {os.getpid()}"), lock_output(tmp_path):
            pass
        monkeypatch.setenv("RANK", "1")
        with lock_output(tmp_path):
            pass
