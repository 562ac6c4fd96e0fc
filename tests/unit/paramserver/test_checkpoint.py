"""The state directory: what was saved comes back bit for bit or not at all, whatever fails at whatever moment."""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from safetensors.numpy import save_file

from common.errors import LockedError, StateError
from common.messages import Version
from paramserver import checkpoint
from paramserver.checkpoint import CorruptError, Directory, Loaded, as_read, fingerprint, read

RECORD = {"layout": "[]", "elapsed_s": 0.1 + 0.2, "sessions": [{"token": "ä\ud800", "weight": 1e-5}], "decisions": None}
HOLD = """
import sys, time
from paramserver.checkpoint import Directory
Directory.open(sys.argv[1])
print("held", flush=True)
time.sleep(60)
"""


def state(seed: int = 0, elements: int = 24) -> dict[str, Any]:
    """Arrays as a server has them, of any bits at all: NaN with a payload, infinities, -0, subnormals."""
    rng = np.random.default_rng(seed)
    sizes = {"center": elements, "state.x": elements - 3, "session.0af3.m": elements - 3, "buffers.0af3": 3, "none": 0}
    return {name: rng.integers(0, 2**32, size, np.uint32).view(np.float32) for name, size in sizes.items()}


def same(loaded: Loaded | None, version: Version, seed: int) -> bool:
    """Whether `loaded` is, bit for bit, what `state(seed)` saved as `version`."""
    assert loaded is not None
    arrays = state(seed)
    return (loaded.version, loaded.record, loaded.arrays.keys()) == (version, RECORD, arrays.keys()) and all(
        loaded.arrays[name].tobytes() == array.tobytes() for name, array in arrays.items()
    )


def names(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir()}


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Directory]:
    with closing(Directory.open(tmp_path / "runs" / "a")) as opened:
        yield opened


FIRST, SECOND = Version(1, 10), Version(1, 20)


def save(directory: Directory, version: Version, seed: int, keep: int = 3) -> Path:
    directory.save(version, state(seed), RECORD, keep)
    return directory.checkpoints()[0][1]


class Crashed(BaseException):
    """The process was killed: nothing catches this, and nothing works after it."""


class Steps:
    """Counts every call that touches the disk. The one numbered `fatal` fails, and all after it but for "one error"."""

    CALLS = ("mkdir", "open", "fsync", "rename", "unlink", "rmdir", "statvfs", "posix_fadvise")

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fatal: int, fault: str) -> None:
        self.count, self.fatal, self.fault = 0, fatal, fault
        for name in self.CALLS:
            real = getattr(os, name) if name != "fsync" else lambda descriptor: None
            monkeypatch.setattr(os, name, self._counted(real))
        monkeypatch.setattr(io, "open", self._counted(io.open))
        monkeypatch.setattr(checkpoint, "save_file", self._counted(self._in_two_parts))

    @property
    def hit(self) -> bool:
        return self.count > self.fatal

    def _counted(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._step()
            return real(*args, **kwargs)

        return call

    def _in_two_parts(self, arrays: Any, file: Path) -> None:
        file.write_bytes(b"half")  # a step of its own
        save_file(arrays, file)

    def _step(self) -> None:
        self.count += 1
        if self.hit and self.fault == "killed":
            raise Crashed
        if self.count == self.fatal + 1 or (self.hit and self.fault == "dead disk"):
            raise OSError(errno.EIO, "Input/output error")


FAULTS = ["killed", "dead disk", "one error"]


# --- what was saved comes back ---


@pytest.mark.parametrize("limit_bytes", [4, 8, 20, 96, 1 << 30])
def test_a_checkpoint_comes_back_bit_for_bit(
    directory: Directory, monkeypatch: pytest.MonkeyPatch, limit_bytes: int
) -> None:
    monkeypatch.setattr(checkpoint, "FILE_BYTES", limit_bytes)
    path = save(directory, FIRST, seed=0)
    loaded = directory.load()
    assert same(loaded, FIRST, seed=0)
    assert loaded is not None
    assert loaded.path == path
    assert all(array.flags.writeable and array.flags.owndata for array in loaded.arrays.values())
    files = json.loads((path / "manifest.json").read_text())["files"]
    assert all(4 * sum(facts["arrays"].values()) <= limit_bytes for facts in files.values())
    assert len(files) == -(-sum(array.nbytes for array in state().values()) // limit_bytes), "no more files than needed"
    assert not directory.warnings


def test_only_what_would_come_back_as_it_was_is_saved(directory: Directory) -> None:
    bad: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"center": np.zeros(3)}, RECORD),
        ({"center": np.zeros((3, 3), np.float32)}, RECORD),
        ({"center": np.zeros(6, np.float32)[::2]}, RECORD),
        (state(), {"elapsed_s": float("nan")}),
        (state(), {"weights": np.zeros(2)}),
    ]
    for arrays, record in bad:
        with pytest.raises(StateError, match=r"Checkpoint 1\.10 could not be written to .*: .+\. .+"):
            directory.save(FIRST, arrays, record, keep=3)
        assert names(directory.path) == {"lock"}
    save(directory, FIRST, seed=0)
    with pytest.raises(StateError, match="there already"):
        save(directory, FIRST, seed=1)
    assert same(directory.load(), FIRST, seed=0)


def test_where_there_never_was_a_checkpoint_there_is_none(directory: Directory) -> None:
    directory.next_epoch()
    assert directory.load() is None
    assert not directory.warnings


# --- crashes, errors, power ---


@pytest.mark.parametrize("fault", FAULTS)
def test_a_save_that_ends_anywhere_leaves_the_new_checkpoint_or_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 200)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    outcomes = []
    for fatal in itertools.count():
        path = tmp_path / str(fatal)
        with closing(Directory.open(path)) as directory:
            save(directory, FIRST, seed=0)
            with monkeypatch.context() as patched:
                steps = Steps(patched, fatal, fault)
                try:
                    directory.save(SECOND, state(1), RECORD, keep=1)
                    saved = True
                except (Crashed, StateError):
                    saved = False
            assert not saved or not steps.hit or fault == "killed" or directory.warnings, "an error is told of"
        with closing(Directory.open(path)) as reopened:
            assert not [name for name in names(path) if ".tmp" in name]
            loaded = reopened.load()
            new = same(loaded, SECOND, seed=1)
            assert new or same(loaded, FIRST, seed=0)
            assert new or not saved, "what was reported as saved is there"
            assert new == saved or fault != "one error", "what was reported as failed is not"
            assert not reopened.warnings
            reopened.save(Version(2, 20), state(2), RECORD, keep=1)
            assert same(reopened.load(), Version(2, 20), seed=2)
        outcomes.append(new)
        if not steps.hit:
            break
    assert len(outcomes) > 20
    assert outcomes == sorted(outcomes), "there is one moment at which the new one begins to count"
    assert outcomes[0] is False
    assert outcomes[-1] is True


@pytest.mark.parametrize("fault", FAULTS)
def test_an_epoch_is_never_given_twice_whatever_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    given = [0]
    for fatal in itertools.count():
        with closing(Directory.open(tmp_path)) as directory, monkeypatch.context() as patched:
            assert names(tmp_path) <= {"lock", "epoch.json"}, "nothing is left of an attempt that failed"
            steps = Steps(patched, fatal, fault)
            try:
                given.append(directory.next_epoch())
            except (Crashed, StateError):
                continue
        assert not steps.hit
        break
    with closing(Directory.open(tmp_path)) as directory:
        given += [directory.next_epoch(), directory.next_epoch()]
    assert fatal > 5
    assert given == sorted(set(given))


def test_the_same_version_can_be_tried_again_even_where_nothing_could_be_cleared_away(
    directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int) -> NoReturn:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", refuse)
        patched.setattr(shutil, "rmtree", lambda path, ignore_errors: None)
        with pytest.raises(StateError, match=r"could not be written to .*: Input/output error\. Check the disk"):
            save(directory, FIRST, seed=0)
        assert directory.load() is None
    save(directory, FIRST, seed=0)
    assert same(directory.load(), FIRST, seed=0)


def test_everything_is_on_the_disk_before_what_refers_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 200)
    order: list[str] = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(descriptor: int) -> None:
        order.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).relative_to(tmp_path)}")
        real_fsync(descriptor)

    def rename(old: Path, new: Path) -> None:
        order.append(f"rename {new.relative_to(tmp_path)}")
        real_rename(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    with closing(Directory.open(tmp_path / "runs" / "a")) as directory:
        assert order == ["sync runs", "sync ."], "the names of new directories"
        order.clear()
        assert directory.next_epoch() == 1
        assert order == ["sync runs/a/epoch.json.tmp", "rename runs/a/epoch.json", "sync runs/a"]
        order.clear()
        save(directory, FIRST, seed=0)
        name = "runs/a/checkpoint-000001-000000000010"
        arrays = [f"sync {name}.tmp/arrays-{index:05d}.safetensors" for index in range(2)]
        assert order == [*arrays, f"sync {name}.tmp/manifest.json", f"sync {name}.tmp", f"rename {name}", "sync runs/a"]


def test_a_disk_that_gives_back_other_bytes_is_noticed_before_anything_is_deleted(
    directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(directory, FIRST, seed=0)

    def lossy(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.suffix == ".safetensors":
            flip(path, 99, 1)

    monkeypatch.setattr(os, "fsync", lossy)
    with pytest.raises(StateError, match="does not match its hash"):
        save(directory, SECOND, seed=1, keep=1)
    assert same(directory.load(), FIRST, seed=0)


# --- space ---


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """2 MB of memory, mounted."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount the small disk that this test fills")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no small disk to fill: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("foreseen", [True, False])
def test_a_full_disk_costs_the_new_checkpoint_only(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch, foreseen: bool
) -> None:
    if not foreseen:
        monkeypatch.setattr(checkpoint, "HEADROOM", 0.0)
    with closing(Directory.open(small_disk)) as directory:
        save(directory, FIRST, seed=0)
        expected = r"has 2\.\d MB free, a checkpoint needs 4\.4 MB\. Free some space" if foreseen else "No space left"
        with pytest.raises(StateError, match=expected):
            directory.save(SECOND, {"center": np.zeros(1_000_000, np.float32)}, RECORD, keep=1)
        assert names(small_disk) == {"lock", "checkpoint-000001-000000000010"}
        assert same(directory.load(), FIRST, seed=0)
        save(directory, SECOND, seed=1, keep=1)
        assert same(directory.load(), SECOND, seed=1)


# --- corruption ---


def flip(file: Path, position: int, bit: int) -> None:
    with file.open("r+b") as stream:
        stream.seek(position)
        (byte,) = stream.read(1)
        stream.seek(position)
        stream.write(bytes([byte ^ 1 << bit]))


def each_file(path: Path) -> list[Path]:
    return [path / "arrays-00000.safetensors", path / "arrays-00001.safetensors", path / "manifest.json"]


@pytest.fixture
def two_files(directory: Directory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of two array files, and an older one."""
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 200)
    save(directory, FIRST, seed=0)
    return save(directory, SECOND, seed=1)


def test_flipped_bits_and_truncations_are_detected_wherever_they_are(two_files: Path) -> None:
    for file in each_file(two_files):
        whole = file.read_bytes()
        for position in range(len(whole)):
            flip(file, position, position % 8)
            with pytest.raises(CorruptError):
                read(two_files)
            flip(file, position, position % 8)
        for size in (*range(0, len(whole), 10), len(whole) - 1):
            file.write_bytes(whole[:size])
            with pytest.raises(CorruptError):
                read(two_files)
        file.write_bytes(whole + b" ")
        with pytest.raises(CorruptError):
            read(two_files)
        file.write_bytes(whole)
    assert same(read(two_files), SECOND, seed=1)


def damage_flip(path: Path, file: Path) -> None:
    flip(file, 40, 3)


def damage_truncate(path: Path, file: Path) -> None:
    os.truncate(file, 7)


def damage_delete(path: Path, file: Path) -> None:
    file.unlink()


def damage_replace_by_an_older(path: Path, file: Path) -> None:
    shutil.copy(path.with_name("checkpoint-000001-000000000010") / file.name, file)


@pytest.mark.parametrize("which", range(3), ids=["arrays", "more arrays", "manifest"])
@pytest.mark.parametrize("damage", [damage_flip, damage_truncate, damage_delete, damage_replace_by_an_older])
def test_a_corrupt_checkpoint_is_set_aside_and_the_one_before_taken_loudly(
    directory: Directory, two_files: Path, damage: Callable[[Path, Path], None], which: int
) -> None:
    damage(two_files, each_file(two_files)[which])
    assert same(directory.load(), FIRST, seed=0)
    what, lost = directory.warnings
    assert what.startswith(f"{two_files.name} is corrupt: ")
    assert lost.startswith("Going on from checkpoint-000001-000000000010")
    assert names(directory.path) == {"lock", f"{two_files.name}.corrupt", "checkpoint-000001-000000000010"}


def test_where_none_is_valid_nobody_starts_anew_unless_told_to(directory: Directory, two_files: Path) -> None:
    for _, path in directory.checkpoints():
        flip(path / "manifest.json", 5, 0)
    for _ in range(2):  # a supervisor restarts the server
        with pytest.raises(StateError, match=r"none is valid\. Restore one") as refused:
            directory.load()
        assert refused.value.exit_code == 3
    assert directory.load(allow_fresh=True) is None
    assert "Starting anew" in directory.warnings[-1]
    assert len(directory.warnings) == 3
    assert directory.next_epoch() == 2, "versions still only grow"
    save(directory, Version(2, 1), seed=2)
    assert same(directory.load(), Version(2, 1), seed=2)


def test_a_checkpoint_under_the_name_of_another_is_corrupt(directory: Directory) -> None:
    path = save(directory, FIRST, seed=0)
    with pytest.raises(CorruptError, match=r"the manifest is that of 1\.10"):
        read(path.rename(path.with_name("checkpoint-000001-000000000020")))


@pytest.mark.parametrize(
    "arrays",
    [
        {"center": np.zeros(4)},
        {"center": np.zeros((2, 2), np.float32)},
        {"center": np.zeros(3, np.float32)},
        {"center": np.zeros(4, np.float32), "more": np.zeros(1, np.float32)},
        {"other": np.zeros(4, np.float32)},
        {},
    ],
    ids=["float64", "2-d", "short", "one too many", "other name", "none"],
)
def test_files_that_do_not_hold_what_a_manifest_with_the_right_hashes_says_are_corrupt(
    directory: Directory, monkeypatch: pytest.MonkeyPatch, arrays: dict[str, Any]
) -> None:
    monkeypatch.setattr(checkpoint, "save_file", lambda pieces, file: save_file(arrays, file))
    directory.save(FIRST, {"center": np.zeros(4, np.float32)}, RECORD, keep=3)
    with pytest.raises(CorruptError):
        read(directory.checkpoints()[0][1])


@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE, errno.ENOMEM])
def test_what_cannot_be_read_just_now_is_not_called_corrupt(
    directory: Directory, two_files: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    before = names(directory.path)

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(io, "open", refuse)
        with pytest.raises(StateError, match="cannot be read"):
            directory.load()
    assert names(directory.path) == before
    assert same(directory.load(), SECOND, seed=1)


def test_a_checkpoint_of_another_format_is_not_called_corrupt(
    directory: Directory, two_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = names(directory.path)
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    with pytest.raises(StateError, match="has format 1, this version reads 2"):
        directory.load()
    assert names(directory.path) == before


# --- the epoch ---


def test_the_epoch_grows_over_all_lives(tmp_path: Path) -> None:
    for epoch in range(1, 5):
        with closing(Directory.open(tmp_path)) as directory:
            assert directory.next_epoch() == epoch
            assert not directory.warnings


def test_a_corrupt_epoch_goes_on_from_the_checkpoints(directory: Directory) -> None:
    file = directory.path / "epoch.json"
    assert [directory.next_epoch() for _ in range(3)] == [1, 2, 3]
    for position in range(file.stat().st_size):
        flip(file, position, position % 8)
        with pytest.raises(StateError, match="no checkpoint tells the epoch"):
            directory.next_epoch()
        flip(file, position, position % 8)
    save(directory, Version(7, 1), seed=0)
    for damage in (lambda: flip(file, 9, 1), file.unlink, lambda: file.write_bytes(b"")):
        damage()
        directory.warnings.clear()
        assert directory.next_epoch() == 8
        assert "missing or corrupt" in directory.warnings[0]
    assert directory.next_epoch() == 9


# --- the lock ---


def test_one_server_per_directory_until_it_is_gone_however_it_goes(tmp_path: Path) -> None:
    root = str(Path(checkpoint.__file__).parents[1])
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, cwd=root)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        for _ in range(2):
            with pytest.raises(LockedError, match=rf"{tmp_path} is in use .*process {holder.pid}\)\. Stop") as refused:
                Directory.open(tmp_path)
            assert refused.value.exit_code == 4
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    with closing(Directory.open(tmp_path)) as directory:
        with pytest.raises(LockedError, match=f"process {os.getpid()}"):
            Directory.open(tmp_path)
        directory.close()
        Directory.open(tmp_path).close()


def test_a_path_that_cannot_be_a_directory_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StateError, match=r"file cannot be used: File exists\. Serve"):
        Directory.open(tmp_path / "file")


def test_what_would_be_read_is_known_without_a_disk(directory: Directory) -> None:
    """Also the order of keys, for a rule may go through them."""
    record = RECORD | {"decisions": {"w10": (1, 2.5), "w9": {3: None}}, "adopted": True}
    directory.save(FIRST, state(), record, keep=1)
    loaded = directory.load()
    assert loaded is not None
    assert json.dumps(as_read(record)) == json.dumps(loaded.record) != json.dumps(record)
    assert fingerprint(state(), record) == fingerprint(dict(reversed(loaded.arrays.items())), loaded.record)
    assert len({fingerprint(state(), record), fingerprint(state(1), record), fingerprint(state(), RECORD)}) == 3


# --- how long a checkpoint is kept ---


def test_the_newest_and_the_pinned_are_kept(directory: Directory) -> None:
    versions = [Version(1, 9), Version(1, 10), Version(1, 999_999_999_999_999), Version(2, 3), Version(10, 1)]
    for seed, version in enumerate(versions):
        path = save(directory, version, seed, keep=2)
        if version == Version(1, 10):
            (path / "pinned").touch()
    assert [version for version, _ in directory.checkpoints()] == [Version(10, 1), Version(2, 3), Version(1, 10)]
    assert same(read(directory.checkpoints()[-1][1]), Version(1, 10), seed=1), "a pinned checkpoint is still valid"
    assert same(directory.load(), Version(10, 1), seed=4)


def test_an_old_checkpoint_that_cannot_be_deleted_does_not_undo_the_new_one(
    directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(directory, FIRST, seed=0)

    def refuse(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(shutil, "rmtree", refuse)
    for version in range(20, 25):
        directory.save(Version(1, version), state(version), RECORD, keep=1)
        assert same(directory.load(), Version(1, version), seed=version)
    assert len(directory.warnings) == 1, "one sentence, not one for each time"
