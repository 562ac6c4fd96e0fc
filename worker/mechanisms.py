"""Mechanisms that make gradients more diverse, on the gradient of each sample. Yin et al., arXiv 1706.05699, 4.4.

    dropconnect:p     g_i <- D g_i      each coordinate of D is 0 with probability p, else 1 (of gradients, not weights)
    langevin:sigma    g_i <- g_i + xi   xi ~ N(0, sigma^2) in each coordinate
    quantise          g_i <- |g_i| sign(g_i) eta      coordinate l of eta is 1 with probability |g_il| / |g_i|, else 0

|g_i| is the norm of the whole gradient of sample i, over all parameters. Wherever B_S <= n, B_S with any of them is at
least B_S (Theorem 7): larger batches, and so more workers, do no harm. The price is variance.

Laws
* Draws are independent over samples, coordinates and steps, from torch's own random numbers.
* `langevin` and `quantise` change no gradient on average; `dropconnect` scales it by 1 - p, as in the paper.
* Nothing is changed but the gradients: each sample passes through the model as a batch of its own.

Left out: models whose samples depend on each other, such as batch norm while training; they are refused. The gradients
of all samples of a batch are held at once: batch x parameters x 4 bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from common import discovery
from common.errors import ConfigError

Examples: TypeAlias = list[Tensor]
"""(samples, ...) for each parameter: the gradient of every sample."""
Loss: TypeAlias = Callable[[nn.Module, Any], Tensor]
Feed: TypeAlias = Callable[[Sequence[Tensor], Sequence[Tensor], tuple[int, int]], None]
"""feed(g_a, g_b, samples): mean gradients of both halves, and how many samples each has."""


class Mechanism(NamedTuple):
    """One of them, with its parameter. change(gradients, parameter) -> gradients, which may be those, changed."""

    name: str
    parameter: float
    change: Callable[[Examples, float], Examples]


def dropconnect(g: Examples, p: float) -> Examples:
    """Each coordinate is 0 with probability p."""
    return [each.mul_(torch.rand_like(each) >= p) for each in g]


def langevin(g: Examples, sigma: float) -> Examples:
    """Noise of N(0, sigma^2) on each coordinate."""
    return [each.add_(torch.randn_like(each), alpha=sigma) for each in g]


def quantise(g: Examples, parameter: float = 0.0) -> Examples:
    """Each coordinate becomes 0 or, up to its sign, the norm of its sample's gradient; the mean stays."""
    squares = torch.stack([each.flatten(1).square().sum(1, dtype=torch.float64).to(each.device) for each in g])
    norms = squares.sum(0).sqrt()

    def levels(each: Tensor) -> Tensor:
        norm = norms.to(each.dtype).view(-1, *[1] * (each.dim() - 1))
        return norm * each.sign() * (torch.rand_like(each) * norm < each.abs())

    return [levels(each) for each in g]


KINDS: Mapping[str, tuple[Callable[[Examples, float], Examples], str, Callable[[float], bool]]] = {
    "dropconnect": (dropconnect, "a probability from 0 to below 1, such as dropconnect:0.5", lambda p: 0 <= p < 1),
    "langevin": (langevin, "a standard deviation from 0, such as langevin:0.01", lambda sigma: 0 <= sigma < math.inf),
    "quantise": (quantise, "", lambda none: True),
}
"""Name -> what it does, what its parameter is (\"\": it has none), and which are allowed."""


def parse(text: str) -> Mechanism | None:
    """The mechanism of a text such as `dropconnect:0.5`; None of an empty one. Raises ConfigError for any other."""
    if not text:
        return None
    name, colon, given = text.partition(":")
    if name not in KINDS:
        raise ConfigError(
            f"There is no mechanism '{name}'{discovery.nearest(name, KINDS)}.",
            fix="There are dropconnect:P, langevin:SIGMA and quantise.",
        )
    change, meaning, allowed = KINDS[name]
    if not meaning:
        if colon:
            raise ConfigError(f"Mechanism '{name}' takes no parameter, not '{given}'.", fix=f"Say {name}.")
        return Mechanism(name, 0.0, change)
    try:
        value = float(given)
    except ValueError:
        value = math.nan
    if not allowed(value):
        raise ConfigError(f"The parameter of mechanism '{name}' cannot be '{given}'.", fix=f"It is {meaning}.")
    return Mechanism(name, value, change)


def per_example(model: nn.Module, loss: Loss, batch: Any) -> tuple[Examples, Tensor]:
    """The gradient of every sample, for each trainable parameter, and (samples,) the losses.

    `loss` is given one sample at a time, as a batch of its own. Raises ConfigError for a model or batch for which this
    cannot be done.
    """
    _check(model, batch)
    wrapped = _Loss(model, loss)
    trained = {name: one.detach() for name, one in wrapped.named_parameters() if one.requires_grad}

    def of_one(parameters: dict[str, Tensor], sample: Any) -> Tensor:
        found: Tensor = torch.func.functional_call(wrapped, parameters, (_map(lambda x: x.unsqueeze(0), sample),))
        return found

    gradients = torch.func.vmap(torch.func.grad_and_value(of_one), in_dims=(None, 0), randomness="different")
    try:
        with _AnyFormat():
            found, losses = gradients(trained, batch)
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise ConfigError(
            f"The gradients of single samples cannot be taken of this model and loss: {reason}.",
            fix="Leave --mechanism out, or write model and loss without what looks at values or changes buffers.",
        ) from error
    return list(found.values()), losses


def backward(model: nn.Module, loss: Loss, batch: Any, mechanism: Mechanism, feed: Feed | None = None) -> Tensor:
    """In place of `loss.backward()`: the mean of all changed gradients is added to `.grad`; returns the mean loss.

    feed: is given the mean gradients of both halves of the batch, where there are two.
    """
    g, losses = per_example(model, loss, batch)
    g = mechanism.change(g, mechanism.parameter)
    n, half = len(losses), len(losses) // 2
    if feed is not None and half:
        feed([each[:half].mean(0) for each in g], [each[half:].mean(0) for each in g], (half, n - half))
    for parameter, each in zip((one for one in model.parameters() if one.requires_grad), g, strict=True):
        mean = each.mean(0)
        parameter.grad = mean if parameter.grad is None else parameter.grad.add_(mean)
    return losses.detach().mean()


class _Loss(nn.Module):
    """A model and its loss as one module, so that its parameters can be given from outside."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model = model
        self._loss = loss

    def forward(self, batch: Any) -> Tensor:
        return self._loss(self.model, batch)


class _AnyFormat(TorchFunctionMode):
    """Asks for no memory format, which vmap cannot give; it decides how values lie, not what they are."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        asked = dict(kwargs or {})
        if asked.pop("memory_format", None) is not None and func is Tensor.to and len(args) == 1 and not asked:
            return args[0]
        return func(*args, **asked)


def _check(model: nn.Module, batch: Any) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            raise ConfigError(
                f"Batch norm ('{name}') makes the samples of a batch depend on each other, so that none has a gradient "
                "of its own.",
                fix="Leave --mechanism out, or normalise by groups or layers.",
            )
    sizes = {len(leaf) for leaf in _leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()}
    if len(sizes) != 1 or not all(isinstance(leaf, Tensor) and leaf.dim() for leaf in _leaves(batch)):
        raise ConfigError(
            "A mechanism needs batches of tensors whose first dimension is the samples, and the task's are not.",
            fix="Leave --mechanism out, or have the data give tensors in tuples, lists or mappings.",
        )


def _map(function: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """The same batch with every tensor replaced."""
    if isinstance(batch, Mapping):
        return {key: _map(function, one) for key, one in batch.items()}
    if isinstance(batch, (tuple, list)):
        kept = [_map(function, one) for one in batch]
        return kept if isinstance(batch, list) else tuple(kept)
    return function(batch)


def _leaves(batch: Any) -> list[Any]:
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    return [leaf for one in batch for leaf in _leaves(one)] if isinstance(batch, (tuple, list)) else [batch]
