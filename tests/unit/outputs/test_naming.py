"""Names of written files."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from clipgen.outputs.naming import free_stem


@given(st.text(max_size=300), st.integers(0, 2**31 - 1))
def test_file_names_stay_inside_the_folder(text: str, seed: int) -> None:
    out = Path("does-not-exist")
    path = free_stem(out, text, seed)
    assert path.parent == out and path.name.endswith(f"-{seed}")
    assert not path.name.startswith((".", "-")) and "/" not in path.name
    assert path.name == path.name.strip() and path.name.isprintable() and len(path.name.encode()) < 120


def test_file_names_of_copies_and_other_prompts_differ(tmp_path: Path) -> None:
    seen = set()
    for name, seed in [("a", 7), ("a", 7), ("a 7", 2), ("a 7 v2", 1), ("a", 7), ("a-7", 1)]:
        stem = free_stem(tmp_path, name, seed)
        assert not list(tmp_path.glob(f"{stem.name}-*"))
        (tmp_path / f"{stem.name}-1.png").touch()
        seen.add(stem)
    assert len(seen) == 6
