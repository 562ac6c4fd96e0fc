"""Codec `auto` through the real session and the real server: the link decides, and nothing that was trained is lost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.simulation.test_feedback import FAULTS, ran

SLOW_MB_S = 1.0
"""An fp32 update takes 28 ms each way."""
NETWORK = "2ms"


@pytest.mark.parametrize(("bandwidth_mb_s", "chosen"), [(0.0, "fp32"), (SLOW_MB_S, "int8")])
@pytest.mark.parametrize("settings", [{}, {"overlap": True}, {"rule": "local_sgd"}], ids=str)
def test_a_slow_link_takes_the_smaller_codec_and_a_fast_one_does_not(
    bandwidth_mb_s: float, chosen: str, settings: dict[str, object], tmp_path: Path
) -> None:
    """Under a rule of rounds too, where an exchange lasts as long as the slowest worker trains."""
    with ran(tmp_path, "", network=NETWORK, bandwidth_mb_s=bandwidth_mb_s, codec="auto", **settings) as (_, trainers):
        for trainer in trainers:
            assert trainer.session is not None
            assert trainer.session.exchanges.choice.startswith(f"{chosen}: an exchange takes ")


@pytest.mark.parametrize("faults", FAULTS)
@pytest.mark.parametrize(("bandwidth_mb_s", "kept"), [(0.0, "fp32"), (SLOW_MB_S, "topk:0.05")])
def test_what_feedback_holds_back_is_not_lost_with_the_choice(
    bandwidth_mb_s: float, kept: str, faults: str, tmp_path: Path
) -> None:
    """Where fp32 is kept, it brings at once all that topk held back."""
    link = {"network": NETWORK, "bandwidth_mb_s": bandwidth_mb_s}
    with ran(tmp_path, FAULTS[faults], **link, codec="auto:topk:0.05", lease_s=4) as (center, trainers):
        remembered = sum(trainer.remembered.astype(np.float64) for trainer in trainers)
        total = sum(trainer.total for trainer in trainers)
        np.testing.assert_allclose(center + remembered, total, atol=1e-4)
        if faults == "none":
            assert all(trainer.session.exchanges.choice.startswith(kept) for trainer in trainers if trainer.session)
            assert np.any(remembered) == (kept != "fp32")
