"""Newton-Schulz iterations: nearly the orthogonal factor of a matrix, by matrix products alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch

Triple = tuple[float, float, float]

# Each step is X <- a X + (b A + c A²) X with A = X Xᵀ. jordan: one triple for all steps (K. Jordan, Muon, 2024). quintic: a
# triple for each step in turn, as in megatron-core's Muon.
COEFFICIENTS: dict[str, tuple[Triple, ...]] = {
    "jordan": ((3.4445, -4.7750, 2.0315),),
    "quintic": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
}
_EPS = 1e-7


def newton_schulz(matrices: torch.Tensor, coefficients: Sequence[Triple], steps: int, dtype: torch.dtype) -> torch.Tensor:
    """fp32 [n, rows, columns] -> fp32 of the same shape, whose singular values are near 1. `dtype`: of the products.

    A matrix of zeros stays zero.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = (x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp_min(_EPS)).to(dtype)
    for step in range(steps):
        a, b, c = coefficients[step % len(coefficients)]
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return (x.mT if tall else x).float()


def update_scale(rows: int, columns: int, scale: str) -> float:
    """The factor on an orthogonal update. match_rms: arXiv 2502.16982, eq. 4; spectral: sqrt(max(1, rows / columns))."""
    return float(0.2 * max(rows, columns) ** 0.5 if scale == "match_rms" else max(1.0, rows / columns) ** 0.5)
