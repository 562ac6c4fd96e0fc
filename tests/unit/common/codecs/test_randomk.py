"""`randomk`: scaled or fed back, never both; the key alone says where."""

from __future__ import annotations

import numpy as np

from common import codecs
from common.codecs.randomk import place
from tests.unit.common.codecs.vectors import decoded, encoded

SCALED, UNSCALED = codecs.load("randomk:0.25"), codecs.load("ef:randomk:0.25")


def test_there_is_scaling_or_feedback() -> None:
    assert (SCALED.remembers, SCALED.unbiased) == (False, True)
    assert (UNSCALED.remembers, UNSCALED.unbiased) == (True, False)
    x = np.array([1, 2, 3, 4, 5, 6], np.float32)
    once, bare = decoded(SCALED, encoded(SCALED, x, 9), 6), decoded(UNSCALED, encoded(UNSCALED, x, 9), 6)
    sent = np.flatnonzero(bare)
    assert (len(sent), sent[0] < 4, sent[1] >= 4) == (2, True, True)
    assert bare[sent].tolist() == x[sent].tolist()
    assert once[sent].tolist() == [4 * x[sent[0]], 2 * x[sent[1]]], "the last stratum has two elements"


def test_each_element_of_a_stratum_is_as_likely() -> None:
    found = [int(place(np.uint64(key), np.uint64(3), np.uint64(7))) for key in range(70_000)]
    counts = np.bincount(found, minlength=7)
    assert len(counts) == 7
    assert np.abs(counts - 10_000).max() <= 5 * np.sqrt(10_000)
