"""The benchmark of whole commands: its stages, and a command that fails."""

from __future__ import annotations

from pathlib import Path

import end_to_end
import pytest


@pytest.mark.slow
def test_end_to_end_measures_a_fresh_process_and_reports_its_failure(tiny_weights: Path, tmp_path: Path) -> None:
    cold = end_to_end.time_cold(tiny_weights)
    assert 0 < cold["first_image"] <= cold["exit"] < end_to_end.TIMEOUT
    warm = end_to_end.time_warm(tiny_weights, repeats=2)
    assert {"decode_tokens", "rank", "save", "total"} <= set(warm["next_call"])
    with pytest.raises(ValueError, match="no such folder"):
        end_to_end.time_cold(tmp_path / "nowhere")
