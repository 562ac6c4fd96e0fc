"""Small coloured images sorted into folders by class, or such folders in a tar file, as tensors.

    train/CLASS/NAME.jpg    test/CLASS/NAME.jpg        .jpeg and .png do too, and whatever folder lies above them

Laws
* Images stand in the order of their names, classes too, packed or not: one data set is one order.
* Decoding is done once: the pixels are kept in one file of the user's cache, under the path, size and time of what
  they come from, and written as a whole or not at all. Where that cannot be, they are decoded each time.
"""

from __future__ import annotations

import io
import logging
import lzma
import os
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.errors import ConfigError

SPLITS = ("train", "test")
ENDINGS = (".jpg", ".jpeg", ".png")
FORMAT = 1
"""Of the file in the cache; another number is another name."""

log = logging.getLogger("paramserver.worker")


class Images(NamedTuple):
    """Pixels and labels."""

    train_x: Tensor
    """(n, 3, side, side) uint8, red, green, blue."""
    train_y: Tensor
    """(n,) int64, places among the sorted names of the classes."""
    test_x: Tensor
    test_y: Tensor


class Name(NamedTuple):
    """What is said of an image by where it lies."""

    split: str
    label: str
    name: str


def load(source: Path, *, side: int) -> Images:
    """source: a tar file, or a folder that holds `train` and `test`; side: pixels of each image.

    Raises ConfigError where something in it is missing or broken, or cannot be decoded here.
    """
    cache = _cache_file(source)
    if cache.is_file():
        try:
            return Images(**load_file(cache))
        except (OSError, SafetensorError, TypeError) as error:
            log.warning("%s cannot be used and is made again: %s", cache, error)
    images = _tensors(source, _decoded(source, side))
    try:
        _write(cache, images)
    except (OSError, SafetensorError) as error:
        log.warning("The decoded images cannot be kept in %s and are decoded each time: %s", cache, error)
    return images


def _tensors(source: Path, found: dict[Name, Any]) -> Images:
    classes = {split: sorted({name.label for name in found if name.split == split}) for split in SPLITS}
    if not classes["train"] or classes["train"] != classes["test"]:
        said = ", ".join(f"{len(labels)} classes in {split}" for split, labels in classes.items())
        raise ConfigError(
            f"{source} holds {said}, not the same in both.",
            fix="It is to hold train/CLASS/NAME.jpg and test/CLASS/NAME.jpg.",
        )
    parts = {}
    for split in SPLITS:
        names = sorted(name for name in found if name.split == split)
        pixels = torch.from_numpy(np.stack([found[name] for name in names]))
        parts[f"{split}_x"] = pixels.permute(0, 3, 1, 2).contiguous()
        parts[f"{split}_y"] = torch.tensor([classes[split].index(name.label) for name in names])
    return Images(**parts)


def _decoded(source: Path, side: int) -> dict[Name, Any]:
    """(side, side, 3) uint8 arrays."""
    try:
        from PIL import Image
    except ImportError:
        raise ConfigError(
            "To decode images Pillow is needed, which is not installed.", fix="Run: pip install 'paramserver[images]'"
        ) from None
    found = {}
    for name, content in _packed(source) if source.is_file() else _unpacked(source):
        try:
            pixels = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
        except (OSError, SyntaxError, ValueError) as error:  # PIL raises all three for broken files
            raise ConfigError(
                f"{'/'.join(name)} in {source} cannot be decoded: {error}.", fix="Fetch it again."
            ) from None
        if pixels.shape != (side, side, 3):
            size = f"{pixels.shape[1]} x {pixels.shape[0]}"
            raise ConfigError(f"{'/'.join(name)} in {source} has {size} pixels, not {side} x {side}.")
        found[name] = pixels
    return found


def _packed(source: Path) -> Iterator[tuple[Name, bytes]]:
    """All images of a tar file, in one go from its start to its end."""
    try:
        with tarfile.open(source, "r|*") as archive:
            for member in archive:
                name = _name(Path(member.name))
                if name is not None and (file := archive.extractfile(member)) is not None:
                    yield name, file.read()
    except (OSError, EOFError, tarfile.TarError, lzma.LZMAError, zlib.error) as error:
        raise ConfigError(f"{source} cannot be read as a tar file: {error}.", fix="Fetch it again.") from None


def _unpacked(source: Path) -> Iterator[tuple[Name, bytes]]:
    for path in _files(source):
        name = _name(path)
        assert name is not None
        yield name, path.read_bytes()


def _files(source: Path) -> list[Path]:
    return sorted(path for split in SPLITS for path in (source / split).glob("*/*") if _name(path))


def _name(path: Path) -> Name | None:
    """None where it is no image of the data set."""
    if len(path.parts) < 3 or path.name.startswith(".") or path.suffix.lower() not in ENDINGS:
        return None
    name = Name(*path.parts[-3:])
    return name if name.split in SPLITS else None


def _cache_file(source: Path) -> Path:
    """Where the decoded images of this very data set are kept, or would be."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "paramserver"
    files = [source] if source.is_file() else _files(source)
    stats = [file.stat() for file in files]
    size, changed_ns = sum(one.st_size for one in stats), max((one.st_mtime_ns for one in stats), default=0)
    key = f"{FORMAT} {source.resolve()} {len(files)} {size} {changed_ns}"
    return folder / f"images-{xxhash.xxh3_128_hexdigest(key.encode())}.safetensors"


def _write(file: Path, images: Images) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".tmp", delete=False) as temporary:
        try:
            save_file(images._asdict(), temporary.name)
            os.replace(temporary.name, file)
        except BaseException:
            Path(temporary.name).unlink(missing_ok=True)
            raise
