"""What a model looks like as one flat float32 vector. Knows no torch: a server needs none (`common.binding` does).

    flat = [ body | dense | buffers ]
             parameters      float buffers (batch-norm statistics), raw

Laws
* Within the parameters, those a lossy codec may quantise (`body`) come first; one-dimensional tensors and tensors
  under 4 KiB (`dense`), which quantise badly, follow. So what goes dense is one range, not a list of ranges.
* A tensor shared under several names (tied weights) occurs once, under its first name.
* Integer buffers (such as a count of batches) are local to each worker: described, so that a mismatch shows, but not
  in the vector.
* Two models fit together exactly if their fingerprints are equal; if not, `difference` names the first tensor.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from common.errors import Code, PeerError

Kind = Literal["parameter", "buffer", "local"]

DENSE_BYTES = 4096
"""Parameters smaller than this, or with one dimension, are never quantised."""
TENSORS = 100_000
DIMENSIONS = 8
NAME_CHARACTERS = 1024
DTYPES = ("float32", "float16", "bfloat16", "float64")
"""Names of the types that parameters and float buffers may have."""


class Tensor(NamedTuple):
    """One tensor of a model. `local` tensors take no room in the vector."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: Kind
    aliases: tuple[str, ...] = ()

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def dense(self) -> bool:
        return len(self.shape) < 2 or 4 * self.elements < DENSE_BYTES

    def __str__(self) -> str:
        return f"{self.kind} '{self.name}' {self.dtype}{list(self.shape)}"


class Layout(NamedTuple):
    """The tensors of a model in the order of the vector: body, dense, buffers; then the local ones."""

    tensors: tuple[Tensor, ...]

    @property
    def parameters(self) -> int:
        """Elements of all parameters: body and dense."""
        return sum(t.elements for t in self.tensors if t.kind == "parameter")

    @property
    def body(self) -> int:
        """Elements that a lossy codec may quantise."""
        return sum(t.elements for t in self.tensors if t.kind == "parameter" and not t.dense)

    @property
    def buffers(self) -> int:
        """Elements of all float buffers."""
        return sum(t.elements for t in self.tensors if t.kind == "buffer")

    @property
    def elements(self) -> int:
        """Length of the flat vector."""
        return self.parameters + self.buffers

    def describe(self) -> bytes:
        """The layout as JSON, for the wire and the checkpoint; `parse` is the inverse."""
        return json.dumps([[t.name, t.shape, t.dtype, t.kind, t.aliases] for t in self.tensors]).encode()

    @property
    def fingerprint(self) -> str:
        """Equal exactly for models that fit together."""
        return hashlib.sha256(self.describe()).hexdigest()[:32]

    def difference(self, other: Layout) -> str:
        """One sentence that names the first tensor in which `other` (a worker's) differs; empty where none does."""
        for mine, theirs in zip(self.tensors, other.tensors, strict=False):
            if mine != theirs:
                return f"The first tensor that differs is {theirs} in the worker, {mine} on the server."
        if len(self.tensors) > len(other.tensors):
            return f"The worker lacks {self.tensors[len(other.tensors)]}."
        if len(self.tensors) < len(other.tensors):
            return f"The worker has {other.tensors[len(self.tensors)]} too many."
        return ""

    @classmethod
    def parse(cls, description: bytes | bytearray | memoryview, *, elements_limit: int) -> Layout:
        """The layout that a stranger described; raises PeerError. Nothing is allocated by what it claims."""
        try:
            rows = json.loads(bytes(description))
            tensors = tuple(_tensor(row) for row in rows[: TENSORS + 1])
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise PeerError(Code.MALFORMED, f"The layout cannot be read ({type(error).__name__}).") from None
        if len(tensors) > TENSORS:
            raise PeerError(Code.LIMIT, f"The model has over {TENSORS} tensors.")
        layout = cls(tensors)
        names = {tensor.name for tensor in tensors}
        if list(tensors) != sorted(tensors, key=order) or layout.parameters == 0 or len(names) < len(tensors):
            raise PeerError(Code.MALFORMED, "The layout has no parameters, or not in order, or one twice.")
        if layout.elements > elements_limit:
            raise PeerError(
                Code.LIMIT,
                f"The model has {layout.elements:,} elements, this server takes at most {elements_limit:,}.",
                fix="Raise `max_elements`.",
            )
        return layout


def center_sha256(center: NDArray[np.float32]) -> str:
    """SHA-256 of a whole vector, (elements,) as little-endian float32: equal exactly where every bit is."""
    return hashlib.sha256(np.ascontiguousarray(center, "<f4").data).hexdigest()


def order(tensor: Tensor) -> int:
    """Place of a tensor's group in the vector; sorting is stable, so the model's order holds within a group."""
    if tensor.kind == "parameter":
        return int(tensor.dense)
    return 2 if tensor.kind == "buffer" else 3


def _tensor(row: Any) -> Tensor:
    if type(row) is not list:
        raise TypeError("row")
    name, shape, dtype, kind, aliases = row
    if type(shape) is not list or type(aliases) is not list:
        raise TypeError("shape or aliases")
    plain = [name, dtype, kind, *aliases]
    if not all(type(text) is str and len(text) <= NAME_CHARACTERS for text in plain) or kind not in get_args(Kind):
        raise ValueError("names")
    if kind != "local" and dtype not in DTYPES:
        raise ValueError("dtype")
    if len(shape) > DIMENSIONS or not all(type(size) is int and 0 <= size < 1 << 40 for size in shape):
        raise ValueError("shape")
    return Tensor(name, tuple(shape), dtype, kind, tuple(aliases))
