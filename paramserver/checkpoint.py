"""A server's state directory: its lock, its epoch, and its checkpoints.

    lock                                       held by the one server of this directory; its pid
    epoch.json                                 lives of the server so far
    checkpoint-<epoch>-<version>/              one state of the server, whole
        arrays-00000.safetensors ...           flat float32 arrays; one that does not fit goes on in the next file
        manifest.json                          version, record, and size, hash and arrays of every file
        pinned                                 (empty, put there by a person) never delete this one

Laws
* A checkpoint is there whole or not at all: temporary directory -> files -> manifest -> read again -> rename, and
  everything is on the disk (fsync) before what refers to it. A failed fsync ends the attempt; it is never repeated.
* No file is overwritten in place, and nothing is deleted before a newer checkpoint was read back from the disk.
* Nothing is loaded of which one bit differs from what was written: files carry hashes, and the JSON files a hash of
  themselves. A corrupt checkpoint is set aside as `*.corrupt`, the one before it is taken, and `warnings` says so.
* Where there were checkpoints and none is valid, nobody starts anew unless told to, however often he restarts.
* The epoch is durable before it is used.

Left out: what the arrays and the record mean (`core`), when to save, and resharding.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from common.codecs.base import F32
from common.errors import LockedError, StateError
from common.messages import Version

FORMAT = 1
FILE_BYTES = 1 << 30
"""Array bytes in one file, at most."""
HEADROOM = 1.1
"""A checkpoint is begun only where this many times its bytes are free."""

LOCK, EPOCH, MANIFEST, PINNED = "lock", "epoch.json", "manifest.json", "pinned"
_NAME = re.compile(r"checkpoint-([0-9]+)-([0-9]+)(?:\.tmp|\.corrupt)?")
_MALFORMED = (SafetensorError, ValueError, TypeError, KeyError, AttributeError, RecursionError)
"""What reading and writing raise beside OSError when the content makes no sense."""
_canonical = partial(json.dumps, allow_nan=False, sort_keys=True, separators=(",", ":"))


class CorruptError(StateError):
    """A checkpoint is not what was written."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A checkpoint, verified. The arrays are (elements,) float32, writable, and belong to the caller."""

    arrays: dict[str, F32] = field(repr=False)
    record: dict[str, Any] = field(repr=False)
    version: Version
    path: Path


class Directory:
    """A state directory that this process has locked; made by `open`. One thread at a time may call it."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self.warnings: list[str] = []
        """What went wrong and was survived: sentences for the person who watches."""
        self._lock: int | None = lock

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Directory:
        """Make the directory where needed, lock it, clear away what a crash left; raises LockedError, StateError."""
        path = Path(path).absolute()
        with _translated(f"The state directory {path} cannot be used", "Serve in a directory this user may write to."):
            made = [folder for folder in (path, *path.parents) if not folder.exists()]
            path.mkdir(parents=True, exist_ok=True)
            for folder in made:
                _sync(folder.parent)
            lock = _lock(path)
            try:
                for left_over in path.glob("checkpoint-*.tmp"):
                    shutil.rmtree(left_over)
                _temporary(path / EPOCH).unlink(missing_ok=True)
            except BaseException:
                os.close(lock)
                raise
        return cls(path, lock)

    def close(self) -> None:
        """Give the directory free. The lock file stays: another server may already wait at it."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def next_epoch(self) -> int:
        """Begin a life of the server: one more than any epoch known here, durable on return; the first is 1."""
        file = self.path / EPOCH
        with _translated(f"The epoch could not be written to {file}"):
            seen = [version.epoch for path in self.path.iterdir() if (version := _named(path))]
            try:
                seen.append(int(_unseal(file)["epoch"]))
            except (FileNotFoundError, *_MALFORMED) as error:
                if seen:
                    self._warn(f"{file} is missing or corrupt; the epoch goes on from the checkpoints' ({max(seen)}).")
                elif not isinstance(error, FileNotFoundError):
                    fix = "Restore it from a backup; or, if no worker of an earlier life is left, remove it."
                    raise StateError(f"{file} is corrupt, and no checkpoint tells the epoch.", fix=fix) from None
            epoch = max(seen, default=0) + 1
            _put(_temporary(file), _seal({"format": FORMAT, "epoch": epoch}))
            os.rename(_temporary(file), file)
            _sync(self.path)
        return epoch

    def save(self, version: Version, arrays: Mapping[str, F32], record: Mapping[str, Any], keep: int) -> float:
        """Write one checkpoint, durable on return, then delete all but the newest `keep`; returns the seconds it took.

        arrays: (elements,) float32 each, not changed meanwhile. record: what JSON holds (tuples come back as lists).
        Raises StateError; then nothing new is there, and the checkpoints before are untouched.
        """
        started = time.perf_counter()
        final = self.path / f"checkpoint-{version.epoch:06d}-{version.version:012d}"
        temporary = _temporary(final)
        with _translated(f"Checkpoint {version} could not be written to {self.path}"):
            if final.exists():
                raise ValueError("it is there already")
            try:
                _expect_room(self.path, sum(array.nbytes for array in arrays.values()))
                shutil.rmtree(temporary, ignore_errors=True)
                _write(temporary, version, arrays, record)
                verify(temporary)
                os.rename(temporary, final)
                _sync(self.path)
            except BaseException:
                with suppress(OSError):
                    os.rename(final, temporary)
                shutil.rmtree(temporary, ignore_errors=True)
                raise
        self._delete_old(keep)
        return time.perf_counter() - started

    def load(self, *, allow_fresh: bool = False) -> Loaded | None:
        """The newest valid checkpoint, or None where there never was one; `warnings` tells which were passed over.

        Raises StateError where there were some and none is valid (unless `allow_fresh`), and where one cannot be read
        for a reason that says nothing about its content, such as permissions.
        """
        found = self.checkpoints()
        if not found and not any(self.path.glob("checkpoint-*.corrupt")):  # one that an earlier life set aside counts
            return None
        for _, path in found:
            try:
                loaded = read(path)
            except CorruptError as error:
                self._warn(error.sentence)
                with suppress(OSError):  # then the next start finds it again
                    os.rename(path, path.with_name(f"{path.name}.corrupt"))
                continue
            if path != found[0][1]:
                self._warn(f"Going on from {path.name}, the newest that is valid; what came after it is lost.")
            return loaded
        sentence = f"There were checkpoints in {self.path} and none is valid."
        if not allow_fresh:
            raise StateError(sentence, fix="Restore one from a backup, or start anew with allow_fresh.")
        self._warn(f"{sentence} Starting anew, as allow_fresh says.")
        return None

    def checkpoints(self) -> list[tuple[Version, Path]]:
        """Version and path of each checkpoint here, newest first; not verified."""
        return checkpoints(self.path)

    def _delete_old(self, keep: int) -> None:
        try:
            for _, path in self.checkpoints()[max(keep, 1) :]:
                if not (path / PINNED).exists():
                    os.rename(path, _temporary(path))  # a crash must not leave a half that looks like a whole
                    shutil.rmtree(_temporary(path))
        except (OSError, StateError) as error:
            self._warn(f"An old checkpoint in {self.path} could not be deleted: {_reason(error)}. Delete it by hand.")

    def _warn(self, sentence: str) -> None:
        if sentence not in self.warnings:
            self.warnings.append(sentence)


def checkpoints(directory: Path) -> list[tuple[Version, Path]]:
    """Version and path of each checkpoint in a state directory, newest first; needs no lock."""
    with _translated(f"{directory} cannot be read"):
        whole = [path for path in directory.iterdir() if not path.suffix and path.is_dir()]
    return sorted([(version, path) for path in whole if (version := _named(path))], reverse=True)


def read(path: Path) -> Loaded:
    """One checkpoint, fully verified; raises CorruptError, and StateError where it cannot be judged. Needs no lock."""
    with _judged(path):
        manifest = verify(path)
        files: dict[str, Any] = manifest["files"]
        elements, filled = Counter[str](), Counter[str]()
        for facts in files.values():
            elements.update(facts["arrays"])
        arrays = {name: np.empty(size, np.float32) for name, size in elements.items()}
        for file, facts in sorted(files.items()):
            for name, piece in load_file(path / file).items():
                if piece.dtype != np.float32 or piece.shape != (facts["arrays"].get(name),):
                    raise ValueError(f"array '{name}' in {file} is {piece.dtype} {piece.shape}")
                arrays[name][filled[name] : filled[name] + piece.size] = piece
                filled[name] += piece.size
        if filled != elements:
            raise ValueError("an array lacks elements")
        return Loaded(arrays, manifest["record"], Version(*manifest["version"]), path)


def as_read(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record that `save` was given, as `read` gives it back: lists for tuples, keys as texts and in order."""
    read_back: dict[str, Any] = json.loads(_canonical(json.loads(_canonical(dict(record)))))
    return read_back


def fingerprint(arrays: Mapping[str, F32], record: Mapping[str, Any]) -> str:
    """Equal exactly for two checkpoints of which every bit is equal; the order of arrays and keys does not matter."""
    hasher = xxhash.xxh3_64(_canonical(as_read(record)).encode())
    for name, array in sorted(arrays.items()):
        hasher.update(f"{name} {array.size}".encode())
        hasher.update(np.ascontiguousarray(array, "<f4").data)
    return hasher.hexdigest()


def verify(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, after all sizes and hashes were found to be as it says; raises as `read`."""
    with _judged(path):
        manifest = _unseal(path / MANIFEST)
        if manifest["format"] != FORMAT:
            fix = "Serve with the version of paramserver that wrote it, or in another directory."
            raise StateError(f"{path} has format {manifest['format']}, this version reads {FORMAT}.", fix=fix)
        if (named := _named(path)) and named != Version(*manifest["version"]):
            raise ValueError(f"the manifest is that of {Version(*manifest['version'])}")
        for name, facts in manifest["files"].items():
            if (size := (path / name).stat().st_size) != facts["bytes"]:
                raise ValueError(f"{name} has {size:,} bytes instead of {facts['bytes']:,}")
            if _hash(path / name) != facts["xxh3"]:
                raise ValueError(f"{name} does not match its hash")
        return manifest


def _write(path: Path, version: Version, arrays: Mapping[str, F32], record: Mapping[str, Any]) -> None:
    """All files of a checkpoint, durable; the arrays go into as few files as FILE_BYTES allows."""
    path.mkdir(mode=0o700)  # the record holds the session tokens
    files = {}
    for index, pieces in enumerate(_cut(arrays, FILE_BYTES // 4)):
        file = path / f"arrays-{index:05d}.safetensors"
        save_file(pieces, file)
        facts = {"bytes": file.stat().st_size, "xxh3": _hash(file)}
        files[file.name] = {**facts, "arrays": {name: piece.size for name, piece in pieces.items()}}
        _sync(file)
    manifest = {"format": FORMAT, "version": list(version), "record": dict(record), "files": files}
    _put(path / MANIFEST, _seal(manifest))
    _sync(path)


def _expect_room(path: Path, array_bytes: int) -> None:
    disk = os.statvfs(path)
    free, wanted = disk.f_bavail * disk.f_frsize / 1e6, array_bytes * HEADROOM / 1e6
    if free < wanted:
        sentence = f"{path} has {free:,.1f} MB free, a checkpoint needs {wanted:,.1f} MB."
        raise StateError(sentence, fix="Free some space, or keep fewer checkpoints.")


def _cut(arrays: Mapping[str, F32], limit_elements: int) -> Iterator[dict[str, F32]]:
    """What goes into each file: the arrays in order, in pieces of at most `limit_elements` together."""
    pieces: dict[str, F32] = {}
    room = limit_elements
    for name, array in arrays.items():
        if array.dtype != np.float32 or array.ndim != 1 or not array.flags.c_contiguous:
            raise ValueError(f"array '{name}' is {array.dtype} {array.shape}, not flat float32")
        pieces[name], rest = array[:room], array[room:]
        room -= pieces[name].size
        while rest.size:
            yield pieces
            pieces, rest = {name: rest[:limit_elements]}, rest[limit_elements:]
            room = limit_elements - pieces[name].size
    yield pieces


def _seal(values: dict[str, Any]) -> bytes:
    """JSON that carries its own hash, in the one form that is valid for these values."""
    plain = json.loads(_canonical(values))  # keys are strings now, which sort otherwise than numbers do
    return _canonical({**plain, "xxh3": xxhash.xxh3_64_hexdigest(_canonical(plain).encode())}).encode()


def _unseal(file: Path) -> dict[str, Any]:
    data = file.read_bytes()
    values: dict[str, Any] = json.loads(data)
    values.pop("xxh3")
    if _seal(values) != data:
        raise ValueError(f"{file.name} does not match its hash")
    return values


def _put(file: Path, data: bytes) -> None:
    file.write_bytes(data)
    _sync(file)


def _hash(file: Path) -> str:
    with file.open("rb", buffering=0) as stream:
        return hashlib.file_digest(stream, xxhash.xxh3_64).hexdigest()


def _sync(path: Path) -> None:
    """Bring a file, or the names in a directory, to the disk; what is read afterwards comes from there."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _lock(directory: Path) -> int:
    """The descriptor that holds the lock, until it is closed or the process ends."""
    lock = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(lock, 0)
        os.write(lock, f"{os.getpid()}\n".encode())
    except BlockingIOError:
        holder = os.read(lock, 32).decode(errors="replace").strip() or "unknown"
        os.close(lock)
        fix = "Stop that one, or serve in another directory."
        raise LockedError(f"{directory} is in use by another server (process {holder}).", fix=fix) from None
    return lock


def _named(path: Path) -> Version | None:
    match = _NAME.fullmatch(path.name)
    return Version(int(match[1]), int(match[2])) if match else None


def _temporary(path: Path) -> Path:
    return path.with_name(f"{path.name}.tmp")


@contextmanager
def _translated(what: str, fix: str = "Check the disk: space, permissions, health.") -> Iterator[None]:
    """Errors of the system and of safetensors become ours; what is left can only be the caller's mistake."""
    try:
        yield
    except (OSError, SafetensorError, CorruptError) as error:
        raise StateError(f"{what}: {_reason(error)}.", fix=fix) from error
    except _MALFORMED as error:
        raise StateError(f"{what}: {_reason(error)}.", fix="Please report this.") from error


@contextmanager
def _judged(path: Path) -> Iterator[None]:
    """Tells a corrupt checkpoint from one that this process, now, cannot read."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO):
            fix = "Check permissions and limits; nothing was changed."
            raise StateError(f"{path} cannot be read: {_reason(error)}.", fix=fix) from error
        raise CorruptError(f"{path.name} is corrupt: {Path(error.filename or path).name}: {_reason(error)}.") from error
    except _MALFORMED as error:
        raise CorruptError(f"{path.name} is corrupt: {_reason(error)}.") from error


def _reason(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text.rstrip(".") or type(error).__name__
