"""Ridge regression that chooses its own penalty."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
PENALTIES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


def ridge(inputs: Floats, targets: Floats) -> tuple[Floats, Floats]:
    """Fits a ridge regression with the penalty of `PENALTIES` that gives the smallest leave-one-out error.

    The constant is not penalised.

    Args:
        inputs: standardised inputs of shape (points, inputs).
        targets: targets of shape (points,).

    Returns:
        The coefficients, with the constant first, and the error at each point when it is left out of the fit.
    """
    design = np.c_[np.ones(len(inputs)), inputs]
    best: tuple[float, Floats, Floats] | None = None
    for penalty in PENALTIES:
        inverse = np.linalg.inv(design.T @ design + penalty * np.diag([0.0, *np.ones(inputs.shape[1])]))
        coefficients = inverse @ design.T @ targets
        leverage = np.einsum("ij,jk,ik->i", design, inverse, design)
        left_out = (targets - design @ coefficients) / np.maximum(1 - leverage, 1e-6)
        error = float((left_out**2).mean())
        if best is None or error < best[0]:
            best = (error, coefficients, left_out)
    assert best is not None
    return best[1], best[2]
