"""Task `cifar10`: its network, what is done to an image, and the folders and tar files that images come from."""

from __future__ import annotations

import io
import logging
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from common.errors import ConfigError
from worker.loop import train_alone
from worker.tasks import Context, cifar10, images

CLASSES = tuple(f"class{label}" for label in range(10))


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A cache of its own, and one thread: on a busy machine torch's threads wait for each other."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def color(label: int, number: int) -> tuple[int, int, int]:
    return 20 * label + 10, 8 * number, 128


def write_cifar10(folder: Path, *, train: int = 2, test: int = 1, side: int = 32, ending: str = "png") -> Path:
    """A folder as CIFAR-10 comes: of each class so many images, each of one color, which tells which it is."""
    for split, count in (("train", train), ("test", test)):
        for label, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                image = Image.new("RGB", (side, side), color(label, number))
                image.save(folder / split / name / f"{number:04}.{ending}")
    return folder


def pack(folder: Path, file: Path, *, above: str = "") -> Path:
    """The folder as a tar file, in no good order."""
    with tarfile.open(file, f"w:{file.suffix[1:].replace('tar', '')}") as archive:
        for path in sorted(folder.rglob("*.*"), key=lambda path: path.name[::-1]):
            archive.add(path, Path(above) / path.relative_to(folder))
    return file


def colors(x: Tensor) -> list[list[int]]:
    """Of each image the color of its pixel in the middle."""
    found: list[list[int]] = x[:, :, 16, 16].tolist()
    return found


# --- the network and its batches ---


def test_the_network_is_resnet_20() -> None:
    torch.manual_seed(0)
    network = cifar10.Network()
    assert sum(parameter.numel() for parameter in network.parameters()) == 269_722
    assert sum(isinstance(module, torch.nn.Conv2d | torch.nn.Linear) for module in network.modules()) == 20
    shapes = []
    for block in network.blocks:
        block.register_forward_hook(lambda _, given, made: shapes.append(tuple(made.shape[1:])))
    assert network(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape == (2, 10)
    assert shapes == 3 * [(16, 32, 32)] + 3 * [(32, 16, 16)] + 3 * [(64, 8, 8)]


def test_a_shortcut_keeps_every_second_pixel_in_the_middle_channels() -> None:
    block = cifar10.Block(16, 32, 2)
    torch.nn.init.zeros_(block.norm2.weight)
    x = torch.rand(2, 16, 8, 8)
    y = block(x)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any()
    assert not y[:, 24:].any()


def test_an_image_is_shifted_into_black_and_mirrored_or_not() -> None:
    x = torch.randint(1, 256, (200, 3, 32, 32), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    found = cifar10.shifted_and_mirrored(x, torch.Generator().manual_seed(2))
    padded = torch.nn.functional.pad(x, (4, 4, 4, 4))
    ways = {}
    for index, image in enumerate(found):
        for top in range(9):
            for left in range(9):
                cut = padded[index, :, top : top + 32, left : left + 32]
                for mirrored in (False, True):
                    if torch.equal(image, cut.flip(2) if mirrored else cut):
                        ways[index] = (top, left, mirrored)
    assert len(ways) == 200
    assert {top for top, _, _ in ways.values()} == {left for _, left, _ in ways.values()} == set(range(9))
    assert 60 < sum(mirrored for _, _, mirrored in ways.values()) < 140
    same = cifar10.shifted_and_mirrored(x, torch.Generator().manual_seed(2))
    assert torch.equal(found, same)


def test_a_pass_is_whole_batches_of_the_training_images(tmp_path: Path) -> None:
    task = cifar10.make(Context(data=write_cifar10(tmp_path / "data", train=14)))
    (batch,) = task.batches
    x, y = batch
    assert x.shape == (128, 3, 32, 32)
    assert [round((red - 10) / 20) for red, _, _ in colors(x)] == y.tolist()
    assert len(set(map(tuple, colors(x)))) == 128


def test_two_runs_from_one_seed_are_the_same_bit_for_bit(tmp_path: Path) -> None:
    folder = write_cifar10(tmp_path / "data", train=13)
    runs = []
    for _ in range(2):
        task = cifar10.make(Context(1, 2, data=folder))
        train_alone(task, 1)
        runs.append([*task.model.parameters(), task.evaluate(task.model)])
    *weights, last = zip(*runs, strict=True)
    assert all(torch.equal(*pair) for pair in weights)
    assert last[0] == last[1]
    assert last[0].samples == 10


# --- where images come from ---


@pytest.mark.parametrize("place", ["", "cifar10"])
def test_the_folders_lie_in_the_folder_or_its_cifar10(tmp_path: Path, place: str) -> None:
    write_cifar10(tmp_path / "data" / place)
    task = cifar10.make(Context(data=tmp_path / "data"))
    evaluation = task.evaluate(task.model)
    assert evaluation is not None
    assert evaluation.samples == 10


@pytest.mark.parametrize("name", ["cifar10.tar.xz", "cifar10.tar.gz", "cifar10.tar"])
@pytest.mark.parametrize("above", ["", "some/where"])
def test_packed_or_not_it_is_the_same_data_set(tmp_path: Path, name: str, above: str) -> None:
    folder = write_cifar10(tmp_path / "data")
    unpacked = images.load(folder, side=32)
    (tmp_path / "packed").mkdir()
    file = pack(folder, tmp_path / "packed" / name, above=above)
    packed = images.load(file, side=32)
    assert all(map(torch.equal, packed, unpacked))
    assert colors(packed.train_x) == [list(color(label, number)) for label in range(10) for number in range(2)]
    assert packed.test_y.tolist() == list(range(10))
    for data in (file, file.parent):
        assert len(next(iter(cifar10.make(Context(data=data)).batches), [[]])[0]) == 0  # 20 are no whole batch


def test_a_jpeg_is_decoded_to_its_pixels(tmp_path: Path) -> None:
    found = images.load(write_cifar10(tmp_path / "data", ending="jpg"), side=32)
    exact = torch.tensor([color(label, number) for label in range(10) for number in range(2)])
    assert (found.train_x[:, :, 16, 16].long() - exact).abs().max() <= 3


def test_what_was_decoded_is_kept_until_the_data_set_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_cifar10(tmp_path / "data")
    first = images.load(folder, side=32)
    (kept,) = (tmp_path / "cache" / "paramserver").iterdir()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "PIL", None)
        assert all(map(torch.equal, first, images.load(folder, side=32)))
        (folder / "train" / CLASSES[0] / "0000.png").rename(folder / "train" / CLASSES[9] / "more.png")
        (folder / "train" / CLASSES[0] / "also.png").write_bytes(
            (folder / "train" / CLASSES[9] / "more.png").read_bytes()
        )
        with pytest.raises(ConfigError, match=r"pip install 'paramserver\[images\]'"):
            images.load(folder, side=32)
    assert len(images.load(folder, side=32).train_x) == 21
    assert kept.is_file()


def test_without_a_cache_it_goes_on_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cache").write_text("no folder")
    folder = write_cifar10(tmp_path / "data")
    with caplog.at_level(logging.WARNING):
        assert len(images.load(folder, side=32).train_x) == 20
    assert "cannot be kept in" in caplog.text
    assert "decoded each time" in caplog.text


def test_a_broken_cache_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_cifar10(tmp_path / "data")
    first = images.load(folder, side=32)
    (kept,) = (tmp_path / "cache" / "paramserver").iterdir()
    kept.write_bytes(kept.read_bytes()[:1000])
    with caplog.at_level(logging.WARNING):
        again = images.load(folder, side=32)
    assert all(map(torch.equal, first, again))
    assert "made again" in caplog.text
    assert all(map(torch.equal, first, images.load(folder, side=32)))


# --- what is wrong with them ---


def test_without_data_it_says_what_it_wants() -> None:
    with pytest.raises(ConfigError, match=r"train/CLASS/NAME\.jpg .*none were given\. Give --data .*cifar10\.tar\.xz"):
        cifar10.make(Context())


def test_a_folder_without_images_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"finds neither train and test nor cifar10\.tar\.xz in .*Give --data"):
        cifar10.make(Context(data=tmp_path))


def test_a_class_that_is_only_trained_on_is_refused(tmp_path: Path) -> None:
    folder = write_cifar10(tmp_path / "data")
    (folder / "test" / CLASSES[3] / "0000.png").unlink()
    with pytest.raises(ConfigError, match=r"holds 10 classes in train, 9 classes in test, not the same"):
        cifar10.make(Context(data=folder))


def test_another_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"test/class0/0000\.png in .* has 16 x 16 pixels, not 32 x 32"):
        cifar10.make(Context(data=write_cifar10(tmp_path / "small", side=16)))
    for split in images.SPLITS:
        (tmp_path / "few" / split / "cat").mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "few" / split / "cat" / "a.png")
    with pytest.raises(ConfigError, match=r"holds 1 classes, not 10"):
        cifar10.make(Context(data=tmp_path / "few"))


@pytest.mark.parametrize("keep", [0, 20, 300])
def test_a_broken_image_is_named(tmp_path: Path, keep: int) -> None:
    folder = write_cifar10(tmp_path / "data", ending="jpg")
    file = folder / "train" / CLASSES[1] / "0001.jpg"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ConfigError, match=r"train/class1/0001\.jpg in .* cannot be decoded: .*Fetch it again"):
        images.load(folder, side=32)


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.9])
def test_a_tar_file_that_is_cut_off_says_so(tmp_path: Path, keep: float) -> None:
    rng = np.random.default_rng(1)
    folder = write_cifar10(tmp_path / "data")
    noise = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(noise, "png")
    (folder / "train" / CLASSES[0] / "noise.png").write_bytes(noise.getvalue())
    file = pack(folder, tmp_path / "cifar10.tar.xz")
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(ConfigError, match=r"cifar10\.tar\.xz cannot be read as a tar file: .*Fetch it again"):
        cifar10.make(Context(data=tmp_path))
