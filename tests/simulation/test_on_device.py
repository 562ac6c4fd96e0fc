"""Workers whose vectors are torch's: the runs are those of workers with numpy's, bit for bit.

On torch's CPU device, or on a CUDA device where there is one. Models are in host memory: their steps are the same.

Law: whatever the rule, the codec and the network, whatever is refused, lost or undone, both come to the same center,
the same models and the same memories.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from common import codecs
from deploy.simulation.workers import ADDRESS
from tests.simulation.test_feedback import FAULTS, Trainer, ran
from worker.on_device import DeviceVectors
from worker.trainer import Session
from worker.vectors import HostVectors

RULES: dict[str, dict[str, Any]] = {
    "downpour": {},
    "gem": {"rule": "gem"},
    "dc_asgd": {"rule": "dc_asgd"},
    "easgd": {"rule": "easgd", "local_steps": 3, "workers": 2},
    "eamsgd": {"rule": "eamsgd", "local_steps": 3, "workers": 2},
    "local_sgd": {"rule": "local_sgd", "local_steps": 2, "workers": 2},
    "streaming diloco": {
        "rule": "diloco",
        "local_steps": 6,
        "workers": 2,
        "overlap": True,
        "rule_settings": {"fragments": 3, "delay": 1, "alpha": 0.3},
    },
    "lsgd": {"rule": "lsgd", "workers": 2},
}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CODECS = ["fp32", "fp16", "bf16:stochastic", "int8", "ef:int8", "int4", "e3m0", "topk:0.05", "sign", "natural", "qsgd"]
if DEVICE.type != "cpu":
    CODECS = [name for name in CODECS if codecs.load(name).same_bytes]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """For models as small as here, more would only be in each other's way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class OnHost(Trainer):
    """As users have it: a network with batch norm, really trained."""

    device: torch.device | None = None
    vectors: type = HostVectors
    dtype = torch.float32
    steps = 24
    momentum = 0.0
    broken: tuple[int, ...] = ()
    """Steps after which the model holds NaN."""

    def __init__(self, ether: Any, number: int) -> None:
        super().__init__(ether, number)
        torch.manual_seed(3)
        layers = torch.nn.Linear(40, 60), torch.nn.BatchNorm1d(60), torch.nn.Linear(60, 30)
        self.network = torch.nn.Sequential(*layers).to(self.dtype)
        self.sgd = torch.optim.SGD(
            self.network.parameters(), lr=0.05, momentum=self.momentum, nesterov=self.momentum > 0
        )
        self._generator = torch.Generator().manual_seed(number)

    def join(self, optimizer: torch.optim.Optimizer) -> Session:
        session = Session(ADDRESS, self.network, self.sgd, name=self.name, machine=self.machine, device=self.device)
        assert type(session._vectors) is self.vectors
        return session

    def train(self) -> Any:
        """One step."""
        x = torch.randn(16, 40, generator=self._generator).to(self.dtype)
        self.sgd.zero_grad()
        self.network(x).float().square().mean().backward()
        self.sgd.step()
        assert self.session is not None
        if self.session.steps in self.broken:
            with torch.no_grad():
                next(self.network.parameters())[3, 3] = torch.nan
        return 0.0

    @property
    def held(self) -> tuple[bytes, ...]:
        """The model, what is remembered, and what was exchanged."""
        assert self.session is not None
        tensors = [tensor.float().numpy().tobytes() for tensor in self.network.state_dict().values()]
        memory, counted = self.session._vectors.memory, self.session.exchanges
        figures = counted.pushed, counted.rejected, counted.bytes_up, counted.bytes_down, counted.undone
        remembered = [] if memory is None else torch.asarray(memory.e, copy=True, device="cpu").tolist()
        return *tensors, repr((remembered, figures)).encode()


class OnDevice(OnHost):
    """The same with tensors."""

    device = DEVICE
    vectors = DeviceVectors


def expect_the_same(
    directory: Path, faults: str = "", *, least_rejected: int = 0, traits: dict[str, Any] | None = None, **settings: Any
) -> None:
    """Runs of both kinds, of workers with these traits; so many updates at least were rejected in each."""
    found = []
    for kind in (OnHost, OnDevice):
        made = type(kind.__name__, (kind,), traits or {})
        with ran(directory / kind.__name__, faults, kind=made, lease_s=4, **settings) as (center, trainers):
            rejected = sum(trainer.session.exchanges.rejected for trainer in trainers if trainer.session)
            assert rejected >= least_rejected
            found.append((center.tobytes(), [trainer.held for trainer in trainers]))  # type: ignore[attr-defined]
    assert found[0] == found[1]


@pytest.mark.parametrize("rule", RULES)
def test_rules(rule: str, tmp_path: Path) -> None:
    traits = {"momentum": 0.5} if rule == "eamsgd" else {}
    expect_the_same(tmp_path, traits=traits, **RULES[rule])


@pytest.mark.parametrize("overlap", [False, True], ids=["waiting", "overlap"])
@pytest.mark.parametrize("codec", CODECS)
def test_codecs(codec: str, overlap: bool, tmp_path: Path) -> None:
    expect_the_same(tmp_path, codec=codec, overlap=overlap)


@pytest.mark.parametrize("faults", ["all", "cuts"])
@pytest.mark.parametrize("codec", ["fp32", "ef:int8"])
def test_faults(faults: str, codec: str, tmp_path: Path) -> None:
    """Lost, repeated, cut off: what is sent again, taken back or anchored anew is the same."""
    expect_the_same(tmp_path, FAULTS[faults], codec=codec, overlap=True)


@pytest.mark.parametrize("codec", ["fp32", "ef:int8"])
def test_refusals(codec: str, tmp_path: Path) -> None:
    """By the server, of what comes late; and by the encoder, of NaN, of which nothing is sent."""
    late = {"max_lag": 1, "beyond_max_lag": "reject", "rejected_per_minute": 1000}
    expect_the_same(tmp_path / "late", codec=codec, least_rejected=3, **late)
    expect_the_same(tmp_path / "nan", codec=codec, overlap=True, least_rejected=4, traits={"broken": (7, 15)})


@pytest.mark.parametrize("overlap", [False, True], ids=["waiting", "overlap"])
def test_half_precision(overlap: bool, tmp_path: Path) -> None:
    """What a merge rounds goes into the anchor."""
    expect_the_same(tmp_path, overlap=overlap, local_steps=2, traits={"dtype": torch.bfloat16})


def test_differences_and_local_buffers(tmp_path: Path) -> None:
    expect_the_same(tmp_path, codec="bf16", replies="difference", reply_codec="int8", buffers="local", overlap=True)
