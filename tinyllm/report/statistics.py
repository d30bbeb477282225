"""Confidence intervals of a difference that was measured on the same rows twice."""

from __future__ import annotations

import numpy as np

RESAMPLES = 2000
SEED = 0


def paired_difference(before: np.ndarray, after: np.ndarray, counts: np.ndarray) -> dict:
    """How much less ``after`` is than ``before``, per token, with a 95 % interval.

    The rows are drawn again with replacement, each with both of its sums (paired bootstrap, Efron
    and Tibshirani 1993, chapter 13), so that rows that are hard in either case cancel out.

    Args:
        before: sum over a row's tokens, ``(num_rows,)``.
        after: the same of the other model, ``(num_rows,)``.
        counts: tokens of each row, ``(num_rows,)``.

    Returns:
        ``mean``, ``low`` and ``high``, in the unit of one token.
    """
    drop = np.asarray(before, dtype=np.float64) - np.asarray(after, dtype=np.float64)
    counts = np.asarray(counts, dtype=np.float64)
    rows = np.random.default_rng(SEED).integers(len(drop), size=(RESAMPLES, len(drop)))
    means = drop[rows].sum(1) / counts[rows].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return {"mean": float(drop.sum() / counts.sum()), "low": float(low), "high": float(high)}
