"""`eamsgd`: Elastic Averaging SGD on workers with Nesterov momentum. Zhang, Choromanska & LeCun, arXiv 1412.6651.

    v <- delta v - eta g(x + delta v)       a local step
    x <- x + v
    E  = alpha (x - c);  c <- c + E;  x <- x - E            every H local steps, as in `easgd`

    c  center    x, v  a worker's parameters and velocity    delta  momentum    eta  learning rate
    alpha = beta / p    beta .9    p  workers (`recompute`: those that are live, whoever is expected)

The local steps are those of torch.optim.SGD(nesterov=True), whose model holds the point where the gradient is taken:

    y = x + delta v,  v = -lr buf           y: the model's parameters; buf: torch's momentum buffer
    x = y + delta lr buf                    the point that is exchanged
    y <- y - E                              x moves by as much; v is the worker's own and stays

torch's velocity is lr buf with the lr of now: where a schedule changes lr, v changes with it, as it does not in the
paper. Weight decay is part of g. Laws and wire: see `common.rules.elastic`.
Left out: the synchronous form; several learning rates in one worker (x is one formula for the whole vector).
"""

from __future__ import annotations

from typing import Any

from common.rules import elastic
from common.rules.base import Floats, OptimizerFacts, for_kernels, kernel
from common.rules.elastic import Elastic


class Eamsgd(Elastic):
    """Settings of elastic averaging with momentum; the momentum itself is the inner optimizer's."""


@kernel
def _point(x: Any, m: Any, scale: Any) -> None:
    for i in range(x.size):
        x[i] += scale * m[i]


def accept(config: Eamsgd, optimizer: OptimizerFacts) -> str | None:
    """The exchanged point is known for torch's Nesterov momentum, and for one learning rate."""
    wanted = "Use torch.optim.SGD(lr=..., momentum=..., nesterov=True), or rule 'easgd', which takes any optimizer."
    if optimizer.name != "SGD" or not optimizer.nesterov or optimizer.momentum == 0.0 or optimizer.dampening != 0.0:
        kind = f"{optimizer.name} with momentum {optimizer.momentum:g}, nesterov={optimizer.nesterov}"
        return (
            f"Rule 'eamsgd' takes SGD with Nesterov momentum and no dampening as inner optimizer, this worker uses "
            f"{kind}, dampening={optimizer.dampening:g}: the point that is exchanged is defined by that momentum. "
            f"{wanted}"
        )
    if optimizer.groups > 1:
        return (
            f"Rule 'eamsgd' takes one learning rate, this worker's {optimizer.name} has {optimizer.groups}: the point "
            "that is exchanged is one formula for all parameters. Give all parameter groups the same lr, or use rule "
            "'easgd'."
        )
    return None


def point(config: Eamsgd, x: Floats, m: Floats, optimizer: OptimizerFacts) -> None:
    """x <- y + delta lr buf: from the model's parameters y, (n,), and torch's momentum buffer m, (n,)."""
    scale = optimizer.momentum * optimizer.lr
    if for_kernels(x):
        _point(x, m, x.dtype.type(scale))
    else:
        x += m * scale


RULE = elastic.rule(
    name="eamsgd",
    summary="elastic averaging on workers with Nesterov momentum: the exchange is on x, the model holds x + delta v",
    paper="Zhang, Choromanska & LeCun, arXiv 1412.6651",
    Config=Eamsgd,
    accept=accept,
    point=point,
)
