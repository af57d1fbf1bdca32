"""Metrics of evaluation against torch-fidelity on random features and against closed forms."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clipgen.evaluation.metrics import (
    Gaussian,
    class_score,
    clip_score,
    frechet_distance,
    psnr,
    r_precision,
)

SEEDS = st.integers(0, 2**31)


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gaussian(features: Tensor) -> Gaussian:
    found = Gaussian(features.shape[1])
    for part in features.split(7):
        found.add(part)
    return found


def known(mean: Tensor, covariance: Tensor) -> Gaussian:
    """Statistics that have exactly these moments."""
    found = Gaussian(len(mean))
    found.count = torch.tensor(2.0, dtype=torch.float64)
    found.total = 2 * mean.double()
    found.products = covariance.double() + 2 * torch.outer(mean.double(), mean.double())
    return found


@settings(max_examples=20)
@given(SEEDS, st.integers(20, 60), st.integers(20, 60))
def test_frechet_distance_equals_that_of_torch_fidelity(seed: int, n: int, m: int) -> None:
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    a, b = random(seed, n, 12).double(), 2 * random(seed + 1, m, 12).double() @ random(seed + 2, 12, 12).double() + 1
    theirs = fid_statistics_to_metric(*map(fid_features_to_statistics, (a, b)), verbose=False)
    expected = theirs["frechet_inception_distance"]
    assert frechet_distance(gaussian(a), gaussian(b)) == pytest.approx(expected, rel=1e-7)


@given(st.lists(st.tuples(*[st.floats(-9, 9)] * 2, *[st.floats(0.01, 9)] * 2), min_size=1, max_size=6), SEEDS)
def test_frechet_distance_of_gaussians_with_common_axes_equals_the_closed_form(
    axes: list[tuple[float, float, float, float]], seed: int
) -> None:
    m1, m2, s1, s2 = torch.tensor(axes, dtype=torch.float64).t()
    turn = torch.linalg.qr(random(seed, len(axes), len(axes)).double()).Q
    a = known(turn @ m1, turn @ torch.diag(s1**2) @ turn.t())
    b = known(turn @ m2, turn @ torch.diag(s2**2) @ turn.t())
    expected = float((m1 - m2).square().sum() + (s1 - s2).square().sum())
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-5)


def test_frechet_distance_of_fewer_images_than_features_is_finite() -> None:
    a, b = gaussian(random(0, 3, 50)), gaussian(random(1, 4, 50))
    assert 0 < frechet_distance(a, b) < 200 and frechet_distance(a, a) < 1e-4
    assert frechet_distance(gaussian(torch.zeros(1, 5)), gaussian(torch.ones(1, 5))) == pytest.approx(5)


def test_class_score_ranges_from_one_to_the_number_of_classes() -> None:
    assert class_score(torch.ones(6, 3), 1) == (pytest.approx(1), 0)
    assert class_score(1000 * torch.eye(3).repeat(2, 1), 1)[0] == pytest.approx(3)
    mean, deviation = class_score(random(0, 12, 3), 4)
    assert 1 < mean < 3 and 0 < deviation < 2


def test_r_precision_of_equal_opposite_and_random_embeddings() -> None:
    points = torch.nn.functional.normalize(random(0, 120, 8), dim=1)
    assert r_precision(points, points) == (1.0, 100)
    assert r_precision(-points, points)[0] < 0.05
    assert r_precision(points[:5], points[:5]) == (1.0, 5)
    by_chance, _ = r_precision(torch.nn.functional.normalize(random(1, 120, 8), dim=1), points)
    assert by_chance < 0.1  # about one in a hundred
    repeated = points[:3].repeat(2, 1)
    assert r_precision(repeated, repeated) == (1.0, 3)  # equal prompts do not compete
    assert r_precision(points[:1], points[:1]) == (1.0, 1)


def test_psnr_clip_score_and_geometric_mean_equal_closed_forms() -> None:
    black, grey = torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 25.5)
    assert psnr(black, grey).tolist() == pytest.approx([20, 20]) and psnr(black, black).tolist() == [100, 100]
    assert clip_score(torch.tensor([0.4, -0.2])) == pytest.approx(0.5)
