"""How far a result is from the truth."""

import torch
from torch import Tensor


def errors(actual: Tensor, expected: Tensor) -> tuple[float, float]:
    """Relative Frobenius error, and the worst element's error relative to |expected| + rms(expected).

    actual: any float type. expected: the same shape, float64, computed from the same (rounded) inputs.
    """
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} instead of {tuple(expected.shape)}"
    assert expected.dtype == torch.float64, f"the expected values are {expected.dtype}, not float64"
    difference = (actual.detach().double() - expected.detach()).abs()
    rms = expected.detach().square().mean().sqrt()
    frobenius = difference.norm() / expected.detach().norm()
    return frobenius.item(), (difference / (expected.detach().abs() + rms)).max().item()


def assert_close(actual: Tensor, expected: Tensor, frobenius: float, worst: float) -> None:
    """Both errors of `errors` within their limits; a NaN is not."""
    found = errors(actual, expected)
    assert found[0] <= frobenius, f"relative Frobenius error {found[0]:.2e}, allowed {frobenius:.2e}"
    assert found[1] <= worst, f"worst element's error {found[1]:.2e}, allowed {worst:.2e}"
