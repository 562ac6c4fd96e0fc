"""Gradient diversity: how large a batch may be before its samples say the same. Yin et al., arXiv 1706.05699.

    Delta_S = sum |g_i|^2 / |sum g_i|^2          over the gradients g_i of n samples at the same parameters
    B_S     = n Delta_S = 1 + tr(Sigma) / |G|^2  the batch-size bound; G, Sigma: mean, covariance of one g_i

Two halves of one batch, a and b samples with mean gradients g_a and g_b at the same parameters, estimate both parts
without bias, whatever other workers do meanwhile:

    |G|^2      <g_a, g_b>                              may be negative
    tr(Sigma)  a b / (a + b) |g_a - g_b|^2             (b_h / 2) |g_a - g_b|^2 for halves of b_h samples

Laws
* The ratio is formed nowhere here: a server averages both parts over many measurements and divides then. The raw ratio
  over n workers saturates at n and is no estimate of B_S.
* What is in `.grad` after `split` is the gradient of the mean of both losses, whether it measured or not, to the
  rounding of that sum; `measure` and `micro_batch` leave `.grad` as it is.
* Beside tensors as large as one parameter, a measurement keeps one copy of the gradients (two, where there are
  gradients already when it begins). Sums are float64 scalars, read from the device when they are pushed.

Left out: sparse gradients and micro-batches of different sizes, which are not measured; hooks that expect one backward
pass in a step, such as those of DistributedDataParallel.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from common.errors import UsageError
from common.messages import Diversity

Gradients: TypeAlias = Sequence[Tensor | None]
"""One for each parameter; None where a parameter had no part."""
Number = TypeVar("Number", float, Tensor)


class Estimate(NamedTuple):
    """Of one measurement, () float64 each."""

    gradient: Tensor
    """|G|^2, times the square of the loss scale."""
    noise: Tensor
    """tr(Sigma), times the square of the loss scale."""
    scale: float = 1.0


class Halves(NamedTuple):
    """Two halves whose sizes are perhaps not known yet. inner: <g_a, g_b>, apart: |g_a - g_b|^2, () float64."""

    inner: Tensor
    apart: Tensor
    samples: tuple[int, int] | None
    scale: float


def halves(g_a: Gradients, g_b: Gradients) -> tuple[Tensor, Tensor]:
    """<g_a, g_b> and |g_a - g_b|^2 over all tensors, () float64 each, whatever their dtypes and devices."""
    inner, apart = list[Tensor](), list[Tensor]()
    for a, b in zip(g_a, g_b, strict=True):
        if a is not None and b is not None:
            wide = torch.promote_types(a.dtype, torch.float32)  # squares of half precision do not fit it
            a, b = a.to(wide), b.to(wide)
            inner.append(_sum(a * b))
            apart.append(_sum((a - b).square_()))
        elif (alone := b if a is None else a) is not None:
            apart.append(_squared(alone))
    return _total(inner), _total(apart)


def estimate(inner: Tensor, apart: Tensor, samples: tuple[float, float], scale: float = 1.0) -> Estimate:
    """|G|^2 and tr(Sigma) of two halves of so many samples."""
    a, b = samples
    return Estimate(inner, apart * (a * b / (a + b)), scale)


def estimate_groups(mean: Number, big: Number, groups: int, samples: int) -> tuple[Number, Number]:
    """|G|^2 and tr(Sigma) of `groups` mean gradients of `samples` samples each, at the same parameters.

    mean: mean of their |g|^2; big: |mean of them|^2. The first may be negative.
    """
    return (groups * big - mean) / (groups - 1), samples * groups * (mean - big) / (groups - 1)


class Meter:
    """Measures every k-th optimizer step of one worker; `take` hands over what came of it."""

    def __init__(self, parameters: Iterable[Tensor], every_steps: int = 0) -> None:
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.every_steps = every_steps
        self._steps = 0
        self._open: list[Halves] = []
        self._done: list[Estimate] = []
        self._micro = _MicroBatches(self._parameters)

    @property
    def due(self) -> bool:
        """Whether the step to come is measured."""
        return self.every_steps > 0 and self._steps % self.every_steps == 0

    def split(self, loss_a: Tensor, loss_b: Tensor, samples: tuple[int, int] | None, scale: float) -> Tensor:
        """Backward pass of `scale` times the mean of both losses; that mean, () without graph."""
        a, b = _shares(samples)
        if not self.due:
            mean = a * loss_a + b * loss_b
            (mean * scale).backward()
            return mean.detach()
        before = self._set_aside()
        g_a, g_b = self._gradients(loss_a * scale, keep=True), self._gradients(loss_b * scale)
        self._note(g_a, g_b, samples, scale)
        for parameter, kept, first, second in zip(self._parameters, before, g_a, g_b, strict=True):
            parameter.grad = _weighted_sum(kept, first, a, second, b)
        return a * loss_a.detach() + b * loss_b.detach()

    def measure(self, loss_a: Tensor, loss_b: Tensor, samples: tuple[int, int]) -> None:
        """Backward passes of both mean losses for the measurement alone."""
        before = self._set_aside()
        try:
            self.gradients(self._gradients(loss_a, keep=True), self._gradients(loss_b), samples)
        finally:
            for parameter, kept in zip(self._parameters, before, strict=True):
                parameter.grad = kept

    def gradients(self, g_a: Gradients, g_b: Gradients, samples: tuple[int, int]) -> None:
        """Mean gradients of two halves of so many samples, at the same parameters."""
        self._note(g_a, g_b, samples, 1.0)

    def micro_batch(self, samples: int, scale: float) -> None:
        """The gradients of one more micro-batch are added to `.grad`."""
        if self.due:
            self._micro.add(samples, scale)

    def stepped(self, steps: int, samples: int) -> None:
        """`steps` optimizer steps are done, the last one with so many samples."""
        for one in self._open:
            half = samples / (2 * len(self._open))
            self._done.append(estimate(one.inner, one.apart, one.samples or (half, half), one.scale))
        self._open.clear()
        if (found := self._micro.take()) is not None:
            self._done.append(found)
        self._steps = steps

    def skipped(self) -> None:
        """The optimizer skipped the step: what was measured in it does not count."""
        self._open.clear()
        self._micro.take()

    def take(self) -> Diversity | None:
        """Means over what was measured since the last call; None where nothing was, or nothing finite."""
        done, self._done = self._done, []
        pairs = [(float(one.gradient) / one.scale**2, float(one.noise) / one.scale**2) for one in done]
        good = [pair for pair in pairs if all(map(math.isfinite, pair))]
        if not good:
            return None
        gradient, noise = (math.fsum(part) / len(good) for part in zip(*good, strict=True))
        return Diversity(gradient, max(noise, 0.0), len(good))

    def _note(self, g_a: Gradients, g_b: Gradients, samples: tuple[int, int] | None, scale: float) -> None:
        if _dense(g_a) and _dense(g_b):
            self._open.append(Halves(*halves(g_a, g_b), samples, scale))

    def _set_aside(self) -> list[Tensor | None]:
        """The gradients as they are; from here on there are none."""
        found = [parameter.grad for parameter in self._parameters]
        for parameter in self._parameters:
            parameter.grad = None
        return found

    def _gradients(self, loss: Tensor, *, keep: bool = False) -> list[Tensor | None]:
        """Those of `loss`; `.grad` is empty before and after. keep: the graph, which another loss may share."""
        loss.backward(retain_graph=keep)
        return self._set_aside()


class _MicroBatches:
    """|p_i|^2 of what each micro-batch of one step added to `.grad`, which is empty at first."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = parameters
        self._before: list[Tensor | None] = []
        self._squares: list[Tensor] = []
        self._samples: list[int] = []
        self._scale = 1.0

    def add(self, samples: int, scale: float) -> None:
        now = [parameter.grad for parameter in self._parameters]
        if not _dense(now):
            return
        self._before = self._before or [None] * len(now)
        squares = []
        for i, (g, before) in enumerate(zip(now, self._before, strict=True)):
            if g is None:
                continue
            squares.append(_squared(g if before is None else g - before))
            self._before[i] = g.detach().clone() if before is None else before.copy_(g)
        self._squares.append(_total(squares))
        self._samples.append(samples)
        self._scale = scale

    def take(self) -> Estimate | None:
        """What the micro-batches of the step come to; None where there are not two, or they differ in size.

        What one adds is taken for its share of the mean gradient. Where it is all of its own gradient, both parts are
        larger by the same factor, and their ratio is what it is.
        """
        squares, sizes, last = self._squares, self._samples, self._before
        self._before, self._squares, self._samples = [], [], []
        groups = len(sizes)
        if groups < 2 or len(set(sizes)) > 1:
            return None
        mean = groups * torch.stack(squares).sum()  # p_i = g_i / groups
        big = _total([_squared(g) for g in last if g is not None])
        return Estimate(*estimate_groups(mean, big, groups, sizes[0]), self._scale)


# Sums


def _sum(values: Tensor) -> Tensor:
    """() float64, or float32 where the device has no other."""
    return values.sum(dtype=torch.float32 if values.device.type == "mps" else torch.float64)


def _squared(g: Tensor) -> Tensor:
    return _sum(g.to(torch.promote_types(g.dtype, torch.float32)).square())


def _total(parts: Sequence[Tensor]) -> Tensor:
    """() float64; of several devices, on the first."""
    if not parts:
        return torch.zeros((), dtype=torch.float64)
    where = parts[0].device
    if any(part.device != where for part in parts):
        parts = [part.to(where) for part in parts]
    return torch.stack(list(parts)).sum()


def _shares(samples: tuple[int, int] | None) -> tuple[float, float]:
    """What each half counts in the mean."""
    if samples is None:
        return 0.5, 0.5
    a, b = samples
    if a < 1 or b < 1:
        raise UsageError(f"A half of a batch has at least one sample, not {min(a, b)}.", fix="Split the batch in two.")
    return a / (a + b), b / (a + b)


def _weighted_sum(kept: Tensor | None, g_a: Tensor | None, a: float, g_b: Tensor | None, b: float) -> Tensor | None:
    """kept + a g_a + b g_b, in place of the first that is there."""
    for g, share in ((g_a, a), (g_b, b)):
        if g is not None:
            kept = g.mul_(share) if kept is None else kept.add_(g, alpha=share)
    return kept


def _dense(gradients: Gradients) -> bool:
    return all(g is None or g.layout == torch.strided for g in gradients)
