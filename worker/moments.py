"""Gradient diversity exactly, from the gradient of every sample, and what the mechanisms make of it: for benchmarks.

    Delta_S = sum |g_i|^2 / |sum g_i|^2          B_S = n Delta_S = 1 + tr(Sigma) / |G|^2

With a mechanism (`worker.mechanisms`), S = sum |g_i|^2 and C = sum over i != j of <g_i, g_j>:

    dropconnect   n (1 - p) S / ((1 - p) S + (1 - p)^2 C)
    langevin      (n S + n^2 d sigma^2) / (S + C + n d sigma^2)
    quantise      n Q / (Q + C),  Q = sum |g_i|_2 |g_i|_1

Where B_S <= n, none of them is below B_S. Yin et al., arXiv 1706.05699, definitions 4 and 5, section 4.4, theorem 7.
Left out: differential gradient diversity (definition 6).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from common.errors import UsageError


class Moments(NamedTuple):
    """Sums over the gradients of `samples` samples, each of `dimensions` elements."""

    samples: int
    dimensions: int
    squares: float
    """sum |g_i|^2"""
    total: float
    """|sum g_i|^2"""
    crossed: float
    """sum |g_i|_2 |g_i|_1"""

    @property
    def diversity(self) -> float:
        """Delta_S."""
        return _ratio(self.squares, self.total)

    @property
    def bound(self) -> float:
        """B_S = n Delta_S; infinite where the mean gradient is zero."""
        return _ratio(self.samples * self.squares, self.total)

    @property
    def gradient(self) -> float:
        """|G|^2 of the mean gradient G."""
        return self.total / self.samples**2

    @property
    def noise(self) -> float:
        """tr(Sigma), Sigma the covariance of one sample's gradient."""
        return self.squares / self.samples - self.gradient

    # with a mechanism

    def dropconnect(self, p: float) -> float:
        """B_S where each coordinate of each g_i is 0 with probability p."""
        kept = 1 - p
        return _ratio(self.samples * self.squares, self.squares + kept * (self.total - self.squares))

    def langevin(self, sigma: float) -> float:
        """B_S where noise of N(0, sigma^2) is added to each coordinate of each g_i."""
        n, noise = self.samples, self.samples * self.dimensions * sigma**2
        return _ratio(n * (self.squares + noise), self.total + noise)

    def quantise(self) -> float:
        """B_S where each g_i is quantised to one level."""
        return _ratio(self.samples * self.crossed, self.crossed + self.total - self.squares)


def moments(chunks: Iterable[Tensor]) -> Moments:
    """Of gradients that come in chunks (samples, dimensions); sums in float64."""
    samples, squares, crossed = 0, 0.0, 0.0
    total: Tensor | None = None
    for chunk in chunks:
        g = chunk.double()
        norms = torch.linalg.vector_norm(g, dim=1)
        samples += len(g)
        squares += float(norms.square().sum())
        crossed += float((norms * g.abs().sum(dim=1)).sum())
        total = g.sum(dim=0) if total is None else total + g.sum(dim=0)
    if total is None:
        raise UsageError("There are no gradients to take moments of.")
    return Moments(samples, total.numel(), squares, float(total.square().sum()), crossed)


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.inf
