"""The benchmarks of decoding: counts, comparisons and tables, on a tiny model whose times mean nothing."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import busy
import decode
import precision
import pytest
import roofline
import scaling
import soak
from machine import MACHINE
from PIL import Image
from plot import COLOURS, plot
from training_kit import run

from clipgen.config import GPTConfig
from clipgen.models.gpt import GPT, Linear

TINY = GPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=600, block_size=12, n_cond=16)


def test_roofline_counts_every_weight_of_a_step() -> None:
    linears = [m.weight.numel() for m in GPT(TINY).blocks.modules() if isinstance(m, Linear)]
    assert roofline.matrix_weights(TINY) == sum(linears) + TINY.n_embd * TINY.vocab_size
    one, two = (roofline.step_bytes(TINY, 1, size, 12) for size in (1, 2))
    assert two - one == roofline.matrix_weights(TINY)
    assert roofline.step_flops(TINY, 8) == 16 * roofline.matrix_weights(TINY)
    slow_memory = roofline.floor_seconds(TINY, 1, 2, 12, MACHINE)
    assert slow_memory == pytest.approx(12 * two / 1e9)
    slow_products = roofline.floor_seconds(TINY, 1, 2, 12, MACHINE | {"bfloat16_flops": 1.0})
    assert slow_products == pytest.approx(12 * roofline.step_flops(TINY, 1))


@pytest.mark.parametrize(
    ("benchmark", "option"),
    [(busy, "--repeats"), (decode, "--layers"), (decode, "--rows"), (scaling, "--tokens"), (soak, "--clients")],
)
def test_numbers_below_one_are_refused(
    benchmark: ModuleType, option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(benchmark, monkeypatch, option, 0)
    assert stopped.value.code == 2 and f"{option}: '0'; use a whole number, 1 or more" in capsys.readouterr().err


def test_all_decoders_run_and_are_in_the_table() -> None:
    pytest.importorskip("transformers")
    results, bandwidth = decode.measure(TINY, [1, 2], 1, decode.NAMES)
    assert len(results) == 2 * len(decode.NAMES) and len(bandwidth) == 2
    assert all(r["seconds"] > 0 for r in results)
    decode.compare(results, TINY, MACHINE)
    report = {"machine": MACHINE, "tokens": 12, "layers": 2, "repeats": 1, "results": results}
    table = decode.to_table(report)
    assert "uncached float32 (extrapolated)" in table and "| 1.00x |" in table
    by_name = {r["name"]: r for r in results if r["rows"] == 2}
    ours, theirs = by_name[decode.DEFAULT], by_name[f"transformers dynamic cache, {decode.COMPUTE_NAME}"]
    assert theirs["ours_faster"] == pytest.approx(theirs["seconds"] / ours["seconds"])
    assert "share" in ours and "share" not in theirs


def test_exponent_of_linear_and_quadratic_times() -> None:
    assert scaling.exponent([(64, 1.0), (128, 2.0)]) == pytest.approx(1)
    assert scaling.exponent([(8, 9.0), (64, 1.0), (256, 16.0)]) == pytest.approx(2)
    assert scaling.exponent([(64, 1.0)]) is None


def test_cached_and_uncached_decoding_are_timed_and_plotted(tmp_path: Path) -> None:
    series = scaling.measure(TINY, [8, 4], 1, whole=4)
    assert [n for n, _ in series["cached"]] == [4, 8] and [n for n, _ in series["uncached"]] == [4]
    plot(series, "seconds", tmp_path / "plot.png", logarithmic=True)
    assert set(COLOURS[:2]) <= {c for _, c in Image.open(tmp_path / "plot.png").getcolors(1 << 16)}
    assert not list(tmp_path.glob(".*"))
    exponents = {name: scaling.exponent(points) for name, points in series.items()}
    assert "| 8 |" in scaling.to_table({"machine": MACHINE, "series": series, "exponents": exponents})


def test_precisions_are_compared_on_the_same_tokens(tiny_weights: Path) -> None:
    rows = {row["precision"]: row for row in precision.measure(tiny_weights, ["int8"], ["a lemon", "a red heart"])}
    assert list(rows) == ["float32", "int8"]
    assert rows["float32"]["same_likeliest"] == 1 and rows["float32"]["divergence"] == 0
    assert 0.8 < rows["int8"]["same_likeliest"] <= 1 and 0 < rows["int8"]["divergence"] < 0.05
    assert "| int8 |" in precision.to_table(list(rows.values()))


def test_busy_measures_a_command_under_every_possible_condition() -> None:
    code = "import os, time; time.sleep(0.02); print(os.getpid())"
    times = busy.measure(["-c", code], 2)
    assert set(times) >= {"idle", "beside one busy loop", "beside two busy loops"}
    assert all(len(found) == 2 and min(found) > 0.02 for found in times.values())
    machine = {"instruction_set": "AVX2", "cores": 2, "waiting": "OMP_WAIT_POLICY=PASSIVE"}
    table = busy.to_table({"machine": machine, "repeats": 2, "seconds": {"idle": [2.0, 2.0], "busy": [5.0, 3.0]}})
    assert "| idle | 2.00 | 1.00x |" in table and "| busy | 4.00 | 2.00x |" in table


def test_busy_holds_a_command_to_its_quota() -> None:
    code = "from clipgen.utils.cpu import cpu_quota; raise SystemExit(cpu_quota() != 0.5)"
    try:
        busy.seconds(lambda: busy.under_quota(0.5), ["-c", code])
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
