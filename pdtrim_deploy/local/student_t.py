"""Quantiles of Student's t: how far a mean of few values may be off."""

from __future__ import annotations

# 97.5% quantiles for 1, 2, ... 30 degrees of freedom.
T_975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


def t_975(freedom: int) -> float:
    """Two-sided 95% of Student's t; beyond 30 degrees by its first-order expansion about the normal."""
    return T_975[freedom - 1] if freedom <= len(T_975) else 1.95996 + (1.95996**3 + 1.95996) / (4 * freedom)
