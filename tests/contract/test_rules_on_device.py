"""Every rule's worker half on tensors: the bits of the same on arrays, and inputs left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from common import rules
from tests.rule_driver import inner_optimizer

N, LR = 1027, 0.1
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in rules.names()),
    ("diloco", {"alpha": 0.3}),
    ("lsgd", {"lambda_local": 0.7, "lambda_global": 0.0}),
    ("lsgd", {"lambda_local": 1.0, "lambda_global": 0.5}),
]

pytestmark = [
    pytest.mark.parametrize("device", DEVICES),
    pytest.mark.parametrize(("name", "given"), VARIANTS, ids=str),
]


def vectors() -> dict[str, Any]:
    """Of all sizes, some elements zero, some negative zero."""
    random = np.random.default_rng(5)
    found = {}
    for name in ("x", "m", "anchor", "reply", "out", "sent"):
        x = random.normal(size=N).astype(np.float32) * np.float32(10.0) ** random.integers(-20, 20, N).astype(
            np.float32
        )
        x[random.integers(N, size=N // 8)] = 0.0
        x[random.integers(N, size=N // 8)] = -0.0
        found[name] = x
    return found


def test_tensors_give_the_same_bits(name: str, given: dict[str, Any], device: str) -> None:
    rule = rules.load(name)
    config = rules.configure(rule, given)
    optimizer = inner_optimizer(rule, config, LR)
    halves: list[tuple[Callable[..., None], tuple[str, ...], str]] = [
        (lambda x, anchor, out: rule.update(config, x, anchor, out), ("x", "anchor", "out"), "out"),
        (lambda x, reply: rule.merge(config, x, reply), ("x", "reply"), "x"),
    ]
    if (point := rule.point) is not None:
        halves.append((lambda x, m: point(config, x, m, optimizer), ("x", "m"), "x"))
    if (track := rule.track) is not None:
        halves.append((lambda a, s, r: track(config, a, s, r), ("anchor", "sent", "reply"), "anchor"))
    if (pull := rule.pull) is not None:
        halves.append((lambda x, r: pull(config, x, "local", r), ("x", "reply"), "x"))
        halves.append((lambda x, r: pull(config, x, "global", r), ("x", "reply"), "x"))
    for run, names, changed in halves:
        arrays = vectors()
        tensors = {name: torch.from_numpy(array.copy()).to(device) for name, array in arrays.items()}
        known = {name: array.tobytes() for name, array in arrays.items()}
        run(*(arrays[name] for name in names))
        run(*(tensors[name] for name in names))
        assert {name: tensor.cpu().numpy().tobytes() for name, tensor in tensors.items()} == {
            name: array.tobytes() for name, array in arrays.items()
        }
        assert {name for name in names if arrays[name].tobytes() != known[name]} <= {changed}
