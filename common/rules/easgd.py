"""`easgd`: Elastic Averaging SGD, asynchronous. Zhang, Choromanska & LeCun, arXiv 1412.6651.

    E  = alpha (x - c)      every H local steps of a worker, at any time
    c <- c + E              on the server
    x <- x - E              in the worker, which keeps parameters of its own

    c  center    x  a worker's parameters    alpha = beta / p    beta .9    p  workers

p is the number of workers that are expected, where that is told, else of those that are live at the moment of the
exchange; with `recompute` always the latter. A worker that comes back with its parameters keeps them.

Over the wire goes what changed: the server keeps x_k, what it knows of the worker's x, the worker keeps the same as its
anchor (see `common.rules.elastic`). A lost reply is sent again as it was, because the exchange has happened.

Laws: c + x changes by local steps only; an exchange leaves 1 - 2 alpha of x - c.
Left out: the synchronous form; momentum (that is `eamsgd`, though any inner optimizer is taken here).
"""

from __future__ import annotations

from common.rules import elastic
from common.rules.elastic import Elastic


class Easgd(Elastic):
    """Settings of elastic averaging."""


RULE = elastic.rule(
    name="easgd",
    summary="elastic averaging: each worker keeps its own parameters, and they and the center pull at each other",
    paper="Zhang, Choromanska & LeCun, arXiv 1412.6651",
    Config=Easgd,
)
