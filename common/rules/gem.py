"""`gem`: Gradient Energy Matching. Hermans & Louppe, arXiv 1805.08469.

Scale each element of an update so that the kinetic energy of the center, (shift + u)^2 / 2, matches that of a proxy:
a momentum SGD that would run alone. Staleness is seen only as distance, never counted.

    m     <- mu m + D                                  momentum of this worker's unscaled updates     (Eq. 24)
    shift  = c - s                                     how far the center moved meanwhile             (Eq. 11)
    u      = pi D,  pi = (kappa |m| - |shift|) / |D|                                                  (Eq. 27)
    s     <- c,  c <- c + u

    c  center    D  update    s  the center before this worker's last applied update (at join: the one it was given)
    mu .9    kappa 1    clamp 5: largest pi

| variant         | u                                                 | reply         | use
| `reference`     | sign(D) clip(kappa |m| - |shift|, 0, clamp |D|)   | center after  | training and figures
| `paper`         | D (kappa |m| - |shift|) / (|D| + 1e-16)           | center before | vectors only (Algorithm 1)
| `self_excluded` | sign(m) max(kappa |m| - |shift|, 0), s: c after   | center after  | one worker = momentum SGD

`reference` is the division-free form of 0 <= pi <= clamp; the clamp is in the authors' code and figures, not in their
text. `paper` has no bounds and diverges when workers arrive in random order. `self_excluded` is ours: it leaves the
worker's own last update out of the shift (without overlap: with it, the update in between stays in).

`proxy` "worker" is the published rule: m and its updates are one worker's. `proxy` "global" (the paper's own future
work) feeds one m with the updates of all, and kappa |m| bounds what all of them together moved the center by.

Laws (`reference`): |shift + u| <= kappa |m| wherever |shift| <= kappa |m|; u never opposes D; with a constant
gradient, n round-robin workers and no clamp active a round moves n/(n+1) kappa |m_inf|; of n identical first updates
only the first passes (under "worker"). One worker alone: both proxies are the same, bit for bit.

With `overlap` the oldest gradient in D was taken one exchange earlier, so s is kept two deep (`oldest`).
The proxy brings the momentum, so the inner optimizer is plain SGD without any, unless `any_optimizer` is set.
Left out: adaptive optimizers as proxy.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import DTypeLike
from pydantic import Field

from common.rules import base
from common.rules.base import Apply, Config, Effect, Facts, Floats, NoArrays, OptimizerFacts, Reply, Rule, Terms, kernel

REFERENCE, PAPER, SELF_EXCLUDED = range(3)
VARIANTS = {"reference": REFERENCE, "paper": PAPER, "self_excluded": SELF_EXCLUDED}
EPSILON = 1e-16
"""Keeps `paper` from dividing by zero (Algorithm 1)."""

SAMPLES = 512
"""Elements of each block, evenly spaced, from which energy and pi are reported: exact sums would cost more than the
update itself, because a reduction that keeps its order cannot be vectorised."""
ENERGIES = 2
"""Columns before the samples of pi in a row of figures: kinetic energy of the center, and its bound."""


class Gem(Config):
    """Settings of Gradient Energy Matching; all without unit."""

    mu: float = Field(0.9, ge=0.0, lt=1.0, description="momentum of the proxy, in [0, 1)")
    kappa: float = Field(1.0, gt=0.0, le=10.0, description="energy of the proxy, in (0, 10]; 4 diverged in the paper")
    clamp: float = Field(5.0, gt=0.0, le=1e6, description="largest scale pi of an element, in (0, 1e6]")
    variant: Literal["reference", "paper", "self_excluded"] = Field(
        "reference", description="one of reference, paper (diverges under random arrival), self_excluded"
    )
    proxy: Literal["worker", "global"] = Field(
        "worker", description="one of worker (a momentum for each), global (one momentum for the updates of all)"
    )
    any_optimizer: bool = Field(False, description="true to take inner optimizers other than plain SGD")


class State(NamedTuple):
    """Of the rule, with a global proxy. m: (n,) momentum of all updates."""

    m: Floats


class Session(NamedTuple):
    """Per worker. m: (n,) momentum; s: (n,) center before its last applied update."""

    m: Floats
    s: Floats


class OverlapSession(NamedTuple):
    """As `Session`; oldest: (n,) the s of one exchange before."""

    m: Floats
    s: Floats
    oldest: Floats


class GlobalSession(NamedTuple):
    """As `Session`, with a global proxy."""

    s: Floats


class GlobalOverlapSession(NamedTuple):
    """As `OverlapSession`, with a global proxy."""

    s: Floats
    oldest: Floats


AnySession: TypeAlias = Session | OverlapSession | GlobalSession | GlobalOverlapSession


@kernel
def _u(variant: Any, m: Any, shift: Any, d: Any, kappa: Any, bound: Any) -> Any:
    """What one element of the center moves by; `bound` is the clamp, or epsilon for `paper`."""
    room = kappa * abs(m) - abs(shift)
    if variant == PAPER:
        return d * (room / (abs(d) + bound))
    toward = d if variant == REFERENCE else m
    size = room if room > 0 else room - room
    if variant == REFERENCE:
        size = min(size, bound * abs(d))
    return size if toward > 0 else -size


@kernel
def _apply(c: Any, m: Any, s: Any, d: Any, mu: Any, kappa: Any, bound: Any, weight: Any, variant: Any) -> None:
    for i in range(c.size):
        m[i] = mu * m[i] + d[i]
        before = c[i]
        c[i] = before + weight * _u(variant, m[i], before - s[i], d[i], kappa, bound)
        s[i] = c[i] if variant == SELF_EXCLUDED else before


@kernel
def _apply_with_overlap(
    c: Any, m: Any, s: Any, oldest: Any, d: Any, mu: Any, kappa: Any, bound: Any, weight: Any, variant: Any
) -> None:
    """A kernel of its own: where `oldest` were `s` itself, the compiler would go element by element, 7 times slower."""
    for i in range(c.size):
        m[i] = mu * m[i] + d[i]
        before = c[i]
        c[i] = before + weight * _u(variant, m[i], before - oldest[i], d[i], kappa, bound)
        oldest[i] = s[i]
        s[i] = c[i] if variant == SELF_EXCLUDED else before


@kernel
def _sample(
    c: Any, m: Any, oldest: Any, d: Any, mu: Any, kappa: Any, bound: Any, weight: Any, variant: Any, stats: Any
) -> None:
    """Figures of the update to come, before it is applied, at evenly spaced elements."""
    samples = stats.size - ENERGIES
    stats[:] = np.nan
    stats[:ENERGIES] = 0.0
    stride = (c.size + samples - 1) // samples
    for j in range((c.size + stride - 1) // stride):
        i = j * stride
        momentum = mu * m[i] + d[i]
        shift = c[i] - oldest[i]
        u = weight * _u(variant, momentum, shift, d[i], kappa, bound)
        stats[0] += (np.float64(shift) + np.float64(u)) ** 2
        stats[1] += (np.float64(kappa) * np.float64(momentum)) ** 2
        if d[i] != 0:
            stats[ENERGIES + j] = u / d[i]


def accept(config: Gem, optimizer: OptimizerFacts) -> str | None:
    """The proxy brings the momentum: an inner optimizer with its own would count it twice."""
    if config.any_optimizer or (optimizer.name == "SGD" and optimizer.momentum == 0.0):
        return None
    momentum = f" with momentum {optimizer.momentum:g}" if optimizer.momentum else ""
    return (
        f"Rule 'gem' takes plain SGD without momentum as inner optimizer, this worker uses {optimizer.name}{momentum}: "
        "GEM's proxy already brings the momentum. Use torch.optim.SGD(lr=...), or serve with --set any_optimizer=true."
    )


def state(config: Gem, overlap: bool, n: int, dtype: DTypeLike) -> State | NoArrays:
    """m = 0, where one is fed by all."""
    return base.allocate(State, n, dtype) if config.proxy == "global" else NoArrays()


def fits(config: Gem, terms: Terms) -> str | None:
    """A reply that is held is the center of a later moment, and `paper` answers with the one before the update."""
    if config.variant == "paper" and terms.max_clock_gap is not None:
        return (
            "Rule 'gem' with variant paper answers with the center before an update: max_clock_gap would hold it back."
        )
    return None


def session(config: Gem, overlap: bool, n: int, dtype: DTypeLike) -> AnySession:
    """m = 0; `anchor` sets s to the center the worker is given."""
    kinds = (GlobalSession, GlobalOverlapSession) if config.proxy == "global" else (Session, OverlapSession)
    made: AnySession = base.allocate(kinds[overlap], n, dtype)
    return made


def admit(config: Gem, decisions: None, facts: Facts) -> tuple[None, list[Effect]]:
    """Apply every update as it comes; `paper` answers with the center before it."""
    what, why = ("before", "without the worker's own update") if config.variant == "paper" else ("after", "after it")
    return None, [Apply(1.0, "matched on arrival"), Reply(facts.worker, what, f"the center {why}")]


def anchor(config: Gem, c: Floats, session: AnySession) -> None:
    """s <- c: the worker goes on from this center."""
    session.s[:] = c
    _oldest(session)[:] = c


def apply(
    config: Gem,
    c: Floats,
    state: State | NoArrays,
    session: AnySession,
    d: Floats,
    weight: float,
    args: tuple[float, ...],
    stats: Floats,
) -> None:
    """m <- mu m + D; u by variant; s <- c; c <- c + weight u."""
    real = c.dtype.type
    m, oldest = _momentum(state, session), _oldest(session)
    bound = EPSILON if config.variant == "paper" else config.clamp
    scalars = (real(config.mu), real(config.kappa), real(bound), real(weight), VARIANTS[config.variant])
    _sample(c, m, oldest, d, *scalars, stats)
    if oldest is session.s:
        _apply(c, m, oldest, d, *scalars)
    else:
        _apply_with_overlap(c, m, session.s, oldest, d, *scalars)


def details(config: Gem, stats: Floats) -> dict[str, float]:
    """`pi_median`, `pi_mean`, and `energy_ratio`: kinetic energy of the center over its bound (stable: <= 1)."""
    pi = stats[:, ENERGIES:]
    pi = pi[~np.isnan(pi)]
    kinetic, bound = float(stats[:, 0].sum()), float(stats[:, 1].sum())
    return {
        "pi_median": float(np.median(pi)) if pi.size else 0.0,
        "pi_mean": float(pi.mean()) if pi.size else 0.0,
        "energy_ratio": kinetic / bound if bound > 0 else 0.0,
    }


def _momentum(state: State | NoArrays, session: AnySession) -> Floats:
    """The m that this worker's update feeds: that of all, or its own."""
    if isinstance(session, Session | OverlapSession):
        return session.m
    assert isinstance(state, State)
    return state.m


def _oldest(session: AnySession) -> Floats:
    """What the shift is measured from."""
    return session.oldest if isinstance(session, OverlapSession | GlobalOverlapSession) else session.s


def vectors(config: Gem, before: Floats, kept: Any, c: Floats, state: Any, session: Any) -> dict[str, Floats]:
    """u, shift and m of the last apply."""
    base_of_shift = kept.oldest if hasattr(kept, "oldest") else kept.s
    return {"u": c - before, "shift": before - base_of_shift, "m": (session if hasattr(session, "m") else state).m}


RULE = Rule(
    name="gem",
    summary="Gradient Energy Matching: scale each element so that the center moves like one momentum SGD",
    paper="Hermans & Louppe, arXiv 1805.08469",
    Config=Gem,
    accept=accept,
    fits=fits,
    state=state,
    session=session,
    admit=admit,
    anchor=anchor,
    apply=apply,
    stats_width=ENERGIES + SAMPLES,
    details=details,
    vectors=vectors,
)
