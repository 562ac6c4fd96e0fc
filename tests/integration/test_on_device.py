"""A session whose vectors are torch's against a real server: the training of one with numpy's, bit for bit.

On torch's CPU device, and on a CUDA device where there is one. The model is in host memory: its steps are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.processes import Server, cleaned_up
from worker import on_device
from worker.on_device import DeviceVectors
from worker.trainer import Session

STEPS = 12
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
WAYS = {
    "shared memory": (),
    "messages": ("--no-shared-memory",),
}
FLAGS = {
    "fp32": (),
    "fp32, hidden": ("--overlap",),
    "int8, hidden": ("--overlap", "--codec", "int8"),
    "ef:int8": ("--codec", "ef:int8"),
    "topk, differences": ("--codec", "topk:0.05", "--replies", "difference", "--reply-codec", "int8"),
    "easgd": ("--rule", "easgd", "--local-steps", "3", "--workers", "1"),
}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """So that several go up, on one thread: more would only be in each other's way."""
    monkeypatch.setattr(on_device, "PIECE_CHUNKS", 2)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trained(folder: Path, device: torch.device | None, flags: tuple[str, ...]) -> list[bytes]:
    """What is left of a model of five chunks, in the worker and on the server."""
    folder.mkdir()
    torch.manual_seed(2)
    layers = torch.nn.Linear(1000, 1200), torch.nn.BatchNorm1d(1200), torch.nn.Tanh(), torch.nn.Linear(1200, 10)
    model = torch.nn.Sequential(*layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(4)
    with cleaned_up() as processes:
        server = Server(folder, *flags)
        processes.append(server)
        with Session(server.address, model, optimizer, device=device) as session:
            assert isinstance(session._vectors, DeviceVectors) == (device is not None)
            for step in range(STEPS):
                if step == 7:
                    with torch.no_grad():
                        model[0].weight[5, 5] = torch.inf
                    session.step(0.5, samples=8)
                    continue
                loss = model(torch.randn(8, 1000, generator=generator)).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                session.step(loss, samples=8)
            assert session.exchanges.rejected == 1
            assert session.flush()
            center = session.global_model()
    tensors = [*model.state_dict().values(), *center.state_dict().values()]
    return [tensor.numpy().tobytes() for tensor in tensors]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("flags", FLAGS)
def test_the_training_is_the_same(flags: str, way: str, device: str, tmp_path: Path) -> None:
    chosen = (*FLAGS[flags], *WAYS[way])
    host = trained(tmp_path / "host", None, chosen)
    assert host == trained(tmp_path / "device", torch.device(device), chosen)
