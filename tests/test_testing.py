"""The comparison that every other numerical test stands on."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from proteus_deploy.testing import TOLERANCES, Tolerance, absolute_error, assert_close, relative_error

RELATIVE = Tolerance(1e-3, "relative", "a bound for this test")
ABSOLUTE = Tolerance(1e-3, "absolute", "a bound for this test")


def test_relative_error_is_the_norm_of_the_difference_over_the_norm() -> None:
    assert relative_error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 0.0])) == pytest.approx(4 / 3)
    assert relative_error(np.array([1.0]), torch.tensor([1.0])) == 0


def test_a_zero_reference_is_matched_by_zeros_only() -> None:
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_error(torch.ones(2), torch.zeros(2)) == float("inf")


def test_absolute_error_is_the_largest_difference() -> None:
    assert absolute_error(torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0])) == 0.5


def test_the_error_is_printed_when_it_passes(capsys: pytest.CaptureFixture[str]) -> None:
    error = assert_close("velocity", torch.tensor([1.0001]), torch.tensor([1.0]), RELATIVE)
    assert 0 < error < 1e-3
    assert "velocity: relative error 0.0001" in capsys.readouterr().out


@pytest.mark.parametrize("tolerance", [RELATIVE, ABSOLUTE])
def test_a_difference_above_the_bound_fails_and_names_the_result(tolerance: Tolerance) -> None:
    with pytest.raises(AssertionError, match=r"velocity: .* error .* above 0\.001 \(a bound for this test\)"):
        assert_close("velocity", torch.tensor([1.1]), torch.tensor([1.0]), tolerance)


@pytest.mark.parametrize("tolerance", [RELATIVE, ABSOLUTE])
@pytest.mark.parametrize(("got", "want"), [(float("nan"), 1.0), (float("inf"), 1.0), (1.0, float("nan"))])
def test_numbers_that_are_not_finite_never_pass(tolerance: Tolerance, got: float, want: float) -> None:
    with pytest.raises(AssertionError):
        assert_close("velocity", torch.tensor([got]), torch.tensor([want]), tolerance)


def test_shapes_are_not_broadcast() -> None:
    with pytest.raises(AssertionError, match=r"velocity: the shape is \[1\], expected \[2\]"):
        assert_close("velocity", torch.ones(1), torch.ones(2), RELATIVE)


def test_every_bound_has_its_reason() -> None:
    for key, tolerance in TOLERANCES.items():
        assert 0 < tolerance.bound < 1, key
        assert len(tolerance.reason.split()) > 5, key


def test_the_table_is_read_without_torch() -> None:
    code = "import sys, proteus_deploy.testing; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
