"""Task `mnist`: the paper's network, its gradients, its files and what is said of those that are wrong."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from common.errors import ConfigError
from worker.loop import train_alone
from worker.tasks import Context, mnist


def write_idx(path: Path, values: Tensor) -> None:
    head = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
    content = head + values.to(torch.uint8).numpy().tobytes()
    path.write_bytes(gzip.compress(content, 1, mtime=0) if path.suffix == ".gz" else content)


def write_mnist(folder: Path, *, train: int = 200, test: int = 50, ending: str = "") -> Path:
    """A folder as MNIST comes: on black, a bright bar as long as the label says."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(5)
    for count, (images, labels) in ((train, mnist.FILES[:2]), (test, mnist.FILES[2:])):
        y = torch.arange(count) % 10
        x = torch.zeros(count, 28, 28)
        for image, label in zip(x, y.tolist(), strict=True):
            image[8:18, 4 : 6 + 2 * label] = torch.randint(100, 256, (10, 2 + 2 * label), generator=generator).float()
        write_idx(folder / f"{images}{ending}", x)
        write_idx(folder / f"{labels}{ending}", y)
    return folder


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """On a busy machine torch's threads wait for each other longer than so small a model computes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mnist(tmp_path_factory.mktemp("mnist"))


def plain(model: mnist.Network, x: Tensor) -> Tensor:
    """The network as the paper writes it."""
    x = functional.relu(functional.max_pool2d(model.conv1(x), 2))
    x = functional.relu(functional.max_pool2d(model.drop(model.conv2(x)), 2))
    x = functional.relu(model.linear1(x.flatten(1)))
    logits: Tensor = model.linear3(functional.relu(model.linear2(x)))
    return logits


@pytest.mark.parametrize("training", [True, False])
def test_the_network_and_its_gradients_are_the_papers(data: Path, training: bool) -> None:
    task = mnist.make(Context(data=data))
    model = task.model.train(training)
    assert isinstance(model, mnist.Network)
    assert sum(parameter.numel() for parameter in model.parameters()) == 163_790
    x, y = next(iter(task.batches))
    found = []
    for forward in (model, lambda x: plain(model, x)):
        torch.manual_seed(7)
        loss = functional.cross_entropy(forward(x), y)
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for ours, reference in zip(*found, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5 * reference.abs().max().item())


def test_dropout_draws_from_the_default_generator(data: Path) -> None:
    task = mnist.make(Context(data=data))
    batch = next(iter(task.batches))
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(task.loss(task.model, batch).item())
    assert losses[0] == losses[1] != losses[2]


def test_two_runs_from_one_seed_are_the_same_bit_for_bit(data: Path) -> None:
    runs = []
    for _ in range(2):
        task = mnist.make(Context(1, 2, data=data))
        torch.manual_seed(3)
        train_alone(task, 10)
        runs.append([parameter.detach() for parameter in task.model.parameters()])
    assert all(map(torch.equal, *runs))


def test_it_learns(data: Path) -> None:
    task = mnist.make(Context(data=data))
    before = task.evaluate(task.model)
    torch.manual_seed(0)
    train_alone(task, 60)
    after = task.evaluate(task.model)
    assert before is not None
    assert after is not None
    assert after.samples == 50
    assert after.accuracy > before.accuracy + 0.3


def test_a_pass_is_whole_batches_of_normalised_pixels(data: Path) -> None:
    batches = [x for x, _ in mnist.make(Context(data=data)).batches]
    assert [x.shape for x in batches] == 3 * [(64, 1, 28, 28)]
    pixels = torch.cat(batches) * mnist.STD + mnist.MEAN
    assert pixels.min().item() == pytest.approx(0, abs=1e-6)
    assert pixels.max().item() == pytest.approx(1)


# --- the files ---


def test_what_was_read_serves_all_workers_of_a_process(tmp_path: Path) -> None:
    folder = write_mnist(tmp_path / "once")
    first = mnist.make(Context(data=folder))
    for name in mnist.FILES:
        write_idx(folder / name, torch.zeros(1))
    assert torch.equal(next(iter(first.batches))[0], next(iter(mnist.make(Context(data=folder)).batches))[0])


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("place", ["", "mnist"])
def test_the_files_lie_in_the_folder_or_its_mnist_packed_or_not(tmp_path: Path, place: str, ending: str) -> None:
    write_mnist(tmp_path / place, train=64, test=10, ending=ending)
    _, y = next(iter(mnist.make(Context(data=tmp_path)).batches))
    assert y.bincount().tolist() == [7, 7, 7, 7, 6, 6, 6, 6, 6, 6]


def test_without_a_folder_it_says_which_files_it_wants() -> None:
    with pytest.raises(ConfigError, match=r"--data a folder with train-images-idx3-ubyte, .*t10k-labels-idx1-ubyte"):
        mnist.make(Context())


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    folder = write_mnist(tmp_path / "mnist", train=64, test=10)
    (folder / mnist.FILES[2]).unlink()
    with pytest.raises(ConfigError, match=r"does not find t10k-images-idx3-ubyte in .*mnist\. .*--data a folder"):
        mnist.make(Context(data=tmp_path))


def test_images_without_their_labels_are_refused(tmp_path: Path) -> None:
    folder = write_mnist(tmp_path, train=64, test=10)
    write_idx(folder / mnist.FILES[1], torch.zeros(63))
    with pytest.raises(ConfigError, match=r"train-images-idx3-ubyte holds \(64, 28, 28\) and its labels \(63,\)"):
        mnist.make(Context(data=folder))


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_what_was_written_is_read(tmp_path: Path, ending: str) -> None:
    values = torch.arange(24).view(2, 3, 4).to(torch.uint8)
    write_idx(tmp_path / f"file{ending}", values)
    assert torch.equal(mnist.read_idx(tmp_path / f"file{ending}"), values)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a", b"\0\0\x0d\1\0\0\0\1\0\0\0\0", r"no IDX file of bytes: it starts with 00000d01"),
        ("a", b"", r"starts with nothing"),
        ("a", b"<html>not found</html>", r"starts with 3c68746d"),
        ("a", b"\0\0\x08\3\0\0\0\1", r"cut off or too long: 8 bytes, not its head"),
        ("a", b"\0\0\x08\1\0\0\0\4abc", r"cut off or too long: 11 bytes, not 12 bytes\. Fetch"),
        ("a", b"\0\0\x08\1\0\0\0\2abc", r"11 bytes, not 10 bytes"),
        ("a.gz", b"\0\0\x08\1\0\0\0\1a", r"cannot be read: .*Fetch the file again"),
        ("a.gz", gzip.compress(bytes(1000), mtime=0)[:-9], r"cannot be read: .*Fetch the file again"),
    ],
)
def test_a_broken_file_says_what_is_wrong(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=says):
        mnist.read_idx(tmp_path / name)
