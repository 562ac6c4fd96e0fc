"""`common.chunks` for tensors: the blocks of a plan, encoded and decoded on the device that they lie on.

Laws
* The bytes are those of `Plan.encode`, as far as the codec promises the same bytes everywhere.
* Blocks of one length that lie side by side are done together where the codec can: to a device, a block by itself is
  many calls for little work. Not more of them than `TOGETHER`, so that what is needed meanwhile stays bounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import NamedTuple

from torch import Tensor

from common.chunks import Block, Plan
from common.codecs import draws
from common.codecs.base import Codec
from common.codecs.feedback import Piece

TOGETHER = 64
"""Blocks, of which each needs some 2 MB more while it is encoded."""


class _Run(NamedTuple):
    """Blocks of n elements, and `size` bytes, each: elements [first, last), from byte `offset` on."""

    codec: Codec
    first: int
    last: int
    offset: int
    size: int
    blocks: int

    @property
    def n(self) -> int:
        return (self.last - self.first) // self.blocks

    def encoded(self, data: Tensor) -> tuple[Tensor, Tensor]:
        """(blocks, encoded_bytes(n)) of data: (bytes,), and the padding behind each."""
        rows = data[self.offset : self.offset + self.blocks * self.size].view(self.blocks, self.size)
        end = self.codec.encoded_bytes(self.n)
        return rows[:, :end], rows[:, end:]


def encode(
    plan: Plan,
    flat: Tensor,
    data: Tensor,
    first: int = 0,
    last: int | None = None,
    *,
    key: int = 0,
    before: Mapping[int, Tensor] | None = None,
) -> None:
    """data: (bytes,) uint8 <- flat: (elements,) float32, blocks [first, last). Raises CodecError for NaN or infinity.

    key, before: as for `Plan.encode`.
    """
    for run in _runs(plan.blocks[first:last]):
        x = flat[run.first : run.last]
        device, block_key = run.codec.device, draws.of_block(key, run.first) if run.codec.stochastic else 0
        encoded, padding = run.encoded(data)
        earlier = before.get(run.first) if before else None
        if earlier is not None and device.warm is not None:
            encoded.copy_(device.warm(x, block_key, earlier))
        else:
            encoded.copy_(device.encode(x.view(run.blocks, -1) if device.together else x, block_key))
        padding.zero_()


def decode(plan: Plan, data: Tensor, flat: Tensor) -> None:
    """flat: (elements,) float32 <- checked data: (bytes,) uint8."""
    for run in _runs(plan.blocks):
        _decode(run, data, flat[run.first : run.last])


def pieces(plan: Plan, data: Tensor) -> Iterator[Piece]:
    """All blocks of parameters, for whoever remembers what encoding lost. data: (bytes,) uint8."""
    for run in _runs(plan.blocks[: plan.parameter_blocks]):
        start = None if run.codec.device.warm is None else run.encoded(data)[0][0]
        yield Piece(slice(run.first, run.last), partial(_decode, run, data), start)


def _decode(run: _Run, data: Tensor, x: Tensor) -> None:
    encoded, _ = run.encoded(data)
    found = run.codec.device.decode(encoded if run.codec.device.together else encoded[0], run.n)
    x.copy_(found.reshape(-1))


def _runs(blocks: tuple[Block, ...]) -> Iterator[_Run]:
    """The blocks, in order, as few runs as may be."""
    run: _Run | None = None
    for block in blocks:
        if run is not None and _goes_on(run, block):
            run = run._replace(last=block.last, blocks=run.blocks + 1)
            continue
        if run is not None:
            yield run
        run = _Run(block.codec, block.first, block.last, block.offset, block.size, 1)
    if run is not None:
        yield run


def _goes_on(run: _Run, block: Block) -> bool:
    """Whether the block is one more of the run."""
    return (
        run.codec is block.codec
        and run.codec.device.together
        and run.blocks < TOGETHER
        and run.n == block.last - block.first
    )
