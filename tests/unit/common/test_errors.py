"""Errors are what they say, in the process that reads them, too."""

from __future__ import annotations

import pickle

import pytest

from common.errors import Code, ConfigError, NetworkError, ParamserverError, Refused, WireError


@pytest.mark.parametrize(
    "error",
    [
        ParamserverError("It failed.", fix="Try again."),
        ConfigError("No such setting."),
        NetworkError("Nobody answers.", fix="Is it running?"),
        Refused(Code.FULL, "No room.", fix="Wait."),
        WireError("Not a message.", code=Code.LIMIT),
    ],
)
def test_an_error_is_the_same_in_another_process(error: ParamserverError) -> None:
    error.add_note("seen far away")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert (str(again), vars(again)) == (str(error), vars(error))
