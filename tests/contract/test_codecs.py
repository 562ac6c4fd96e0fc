"""What every codec keeps, whatever it does to a vector: run over every codec that is found.

Laws
* Decoded values lie within the codec's own bound, on ordinary inputs and on the worst ones; a lossless codec returns
  the bits; an unbiased one errs to both sides alike; a contraction contracts; decoded values encode to themselves.
* Encoding and decoding write their output whole, write nothing else, remember nothing, and allocate nothing that grows.
* Same bytes, same bits, also on a thread that flushes subnormal numbers to zero, and on tensors. Where a codec rounds
  at random, the key alone decides.
* NaN and infinity are refused, never quantised. Whatever bytes arrive, `check` passes them or raises CodecError, and
  what it passes decodes to finite values.

No test knows a codec by name: a new file in `common/codecs` is held to all of this as it is, with its parameters as
they are by default, with the examples it gives of them, and with feedback where that makes it another.
"""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common import codecs
from common.codecs.base import BLOCK_ELEMENTS, F32, U8, Codec
from common.errors import Code, CodecError, ConfigError
from common.kernels import ALIGNED_BYTES, FAR_BYTES

FLT_MAX = np.finfo(np.float32).max
SMALLEST = np.finfo(np.float32).smallest_subnormal
LENGTHS = (1, 2, 3, 7, 127, 128, 129, 1023, 1024, 1025, 4096, 5001, BLOCK_ELEMENTS)
ALIGNMENT_BYTES = 8
"""Encoded blocks start at multiples of this."""
ALLOCATION_BYTES = 16_384
"""Room for views and scalars; a block is 16 times as long."""
REFUSALS = {Code.BAD_LENGTH, Code.ENCODING, Code.NON_FINITE}

KEY = 0x0123_4567_89AB_CDEF


def variants(name: str) -> list[str]:
    """As it is by default; with another value for the first, the first two ... parameters; as feedback wants it."""
    codec = codecs.load(name)
    examples = [each.example for each in codec.parameters]
    found = [":".join([name, *examples[:shown]]) for shown in range(len(examples) + 1)]
    return found + [f"ef:{one}" for one in found if codec.unscaled is not None]


EVERY = [text for name in codecs.names() for text in variants(name)]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]

pytestmark = pytest.mark.parametrize("codec", [pytest.param(codecs.load(text), id=text) for text in EVERY])


# Inputs: n -> (n,) float32.


def noise(n: int) -> F32:
    return np.random.default_rng(n).standard_normal(n, dtype=np.float32)


def one_hot(n: int) -> F32:
    x = np.zeros(n, np.float32)
    x[n // 2] = -3.7
    return x


def alternating(n: int) -> F32:
    return np.where(np.arange(n) % 2, np.float32(-0.3), np.float32(0.3))


def huge(n: int) -> F32:
    x = np.random.default_rng(n).uniform(-1.0, 1.0, n).astype(np.float32) * FLT_MAX
    x[0], x[-1] = FLT_MAX, -FLT_MAX
    return x


def denormal(n: int) -> F32:
    return np.random.default_rng(n).integers(-(1 << 22), 1 << 22, n).astype(np.float32) * SMALLEST


def any_bits(n: int) -> F32:
    x = np.random.default_rng(n).integers(0, 1 << 32, n, dtype=np.uint32).view(np.float32)
    return np.where(np.isfinite(x), x, np.float32(0.0))


INPUTS: dict[str, Callable[[int], F32]] = {
    "noise": noise,
    "zeros": lambda n: np.zeros(n, np.float32),
    "negative zeros": lambda n: np.full(n, -0.0, np.float32),
    "constant": lambda n: np.full(n, 0.1, np.float32),
    "one-hot": one_hot,
    "alternating": alternating,
    "huge": huge,
    "largest": lambda n: np.full(n, FLT_MAX, np.float32),
    "denormal": denormal,
    "smallest": lambda n: np.full(n, SMALLEST, np.float32),
    "2^-119": lambda n: np.full(n, 2.0**-119, np.float32),
    "under 2^-119": lambda n: np.full(n, np.nextafter(np.float32(2.0**-119), np.float32(0.0)), np.float32),
    "any bits": any_bits,
}

every_input = pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in INPUTS.items()])
every_length = pytest.mark.parametrize("n", LENGTHS)


def within(codec: Codec, x: F32) -> F32:
    """The same, cut off at what the codec takes."""
    return np.clip(x, -codec.largest, codec.largest).astype(np.float32)


def encoded(codec: Codec, x: F32, *, poison: int = 0xA5, key: int = KEY) -> U8:
    out = np.full(codec.encoded_bytes(x.size), poison, np.uint8)
    codec.encode(x, out, key)
    return out


def decoded(codec: Codec, data: U8, n: int, *, poison: float = np.nan) -> F32:
    x = np.full(n, poison, np.float32)
    codec.decode(data, x)
    return x


def of_whole_rows(codec: Codec, n: int) -> Codec:
    """The codec for a block as a plan cuts it: where it works on matrices, of whole rows, here as many as columns."""
    if codec.of_columns is None:
        return codec
    return codec.of_columns(next(columns for columns in range(math.isqrt(n), 0, -1) if n % columns == 0))


def as_near(codec: Codec, one: F32, two: F32, x: F32) -> bool:
    """Whether two vectors that should be equal are: to the bit, or within the codec's tolerance of |x|."""
    if not codec.tolerance:
        return one.tobytes() == two.tobytes()
    apart = np.linalg.norm(one.astype(np.float64) - two)
    return bool(apart <= codec.tolerance * np.linalg.norm(x.astype(np.float64)))


def code_of(codec: Codec, data: U8, n: int) -> Code | None:
    """Why `check` refuses `data`, or None where it passes, and then decoding it gives finite values."""
    try:
        codec.check(data, n)
    except CodecError as error:
        return error.code
    assert np.isfinite(decoded(codec, data, n)).all()
    return None


# Values.


@every_input
def test_decoded_values_lie_within_the_bound(codec: Codec, make: Callable[[int], F32]) -> None:
    for n in LENGTHS:
        x = within(codec, make(n))
        data = encoded(codec, x)
        codec.check(data, n)
        y = decoded(codec, data, n)
        bound = codec.error_bound(x)
        assert bound.dtype == np.float32
        assert bound.shape == x.shape
        assert np.isfinite(bound).all()
        error = np.abs(y.astype(np.float64) - x).astype(np.float32)  # rounded once, as the bound is
        worst = np.argmax(error - bound)
        assert (error <= bound).all(), f"{x[worst]!r} became {y[worst]!r}, off by more than {bound[worst]!r}, {n} long"
        if codec.lossless:
            assert y.tobytes() == x.tobytes()


@every_input
def test_decoded_values_encode_to_themselves(codec: Codec, make: Callable[[int], F32]) -> None:
    if codec.unbiased and not codec.lossless:
        pytest.skip("rounds at random")
    for n in LENGTHS:
        whole = of_whole_rows(codec, n)
        x = within(codec, make(n))
        if codec.tolerance:
            x *= np.float32(2.0**-9)  # sums are larger than what they are of
        once = decoded(whole, encoded(whole, x), n)
        twice = decoded(whole, encoded(whole, once), n)
        assert as_near(codec, twice, once, once), f"{n} long"


def test_unbiased_means_that_errors_cancel(codec: Codec) -> None:
    """Each element by itself, over 10^5 samples: the same eight numbers over and over, with one key after the other."""
    if not codec.unbiased:
        pytest.skip("biased")
    eight = np.array([0.3, -1.2, 0.05, 2.0, -0.7, 0.0, 0.9, -0.1], np.float32)
    x = np.tile(eight, BLOCK_ELEMENTS // 8)
    samples = np.concatenate(
        [
            (decoded(codec, encoded(codec, x, key=key), x.size).astype(np.float64) - x).reshape(-1, 8)
            for key in range(13)
        ]
    )
    sigma = samples.std(0) / np.sqrt(len(samples))
    assert len(samples) >= 100_000
    assert (np.abs(samples.mean(0)) <= 5.0 * sigma + np.abs(eight) * 2.0**-24).all()


@pytest.mark.parametrize("make", [noise, one_hot, alternating, lambda n: np.full(n, 0.1, np.float32)])
@pytest.mark.parametrize("n", [4096, 5001])
def test_a_contraction_contracts(codec: Codec, make: Callable[[int], F32], n: int) -> None:
    if codec.contraction is None:
        pytest.skip("promises none")
    assert 0 < codec.contraction <= 1
    x = make(n).astype(np.float64)
    keys = range(400 if codec.stochastic else 1)
    lost = [np.square(decoded(codec, encoded(codec, make(n), key=key), n) - x).sum() for key in keys]
    noise_of_the_mean = 5.0 * np.std(lost) / np.sqrt(len(lost))
    assert np.mean(lost) - noise_of_the_mean <= (1.0 - codec.contraction) * np.square(x).sum() * (1 + 1e-6)


@every_input
def test_what_is_lost_and_what_arrives_make_up_the_whole(codec: Codec, make: Callable[[int], F32]) -> None:
    x = within(codec, make(5001))
    y = decoded(codec, encoded(codec, x), x.size)
    with np.errstate(over="ignore"):
        residual = x - y
    if np.isfinite(residual).all():
        ulp = np.maximum(np.maximum(np.abs(x), np.abs(y)) * np.float32(2.0**-23), SMALLEST)
        assert (np.abs(y.astype(np.float64) + residual - x) <= ulp).all()


@pytest.mark.parametrize("n", [1, 1025])
def test_a_magnitude_above_the_largest_is_refused(codec: Codec, n: int) -> None:
    if codec.largest == FLT_MAX:
        pytest.skip("takes every magnitude")
    x = noise(n)
    x[n // 2] = -np.float32(codec.largest)
    codec.check(encoded(codec, x), n)
    x[n // 2] = np.nextafter(x[n // 2], -FLT_MAX)
    with pytest.raises(CodecError) as caught:
        encoded(codec, x)
    assert caught.value.code is Code.ENCODING


@every_length
def test_the_key_alone_decides(codec: Codec, n: int) -> None:
    once = encoded(codec, noise(n), key=KEY).tobytes()
    assert once == encoded(codec, noise(n), key=KEY).tobytes()
    if n >= 4096:
        assert (once == encoded(codec, noise(n), key=KEY + 1).tobytes()) is not codec.stochastic


# Devices.


@pytest.mark.parametrize("device", DEVICES)
@every_input
def test_tensors_give_the_same_bytes_and_bits(codec: Codec, make: Callable[[int], F32], device: str) -> None:
    for n in (1, 3, 128, 1025, 5001):
        x = within(codec, make(n))
        data = encoded(codec, x)
        found = codec.device.encode(torch.from_numpy(x).to(device), KEY)
        assert found.device.type == device
        if codec.tolerance:
            codec.check(found.cpu().numpy(), n)
            assert as_near(codec, decoded(codec, found.cpu().numpy(), n), decoded(codec, data, n), x), f"{n} long"
        elif codec.same_bytes or device == "cpu":
            assert found.cpu().numpy().tobytes() == data.tobytes(), f"{n} long"
        else:  # a scale may be off in its last bit, and now and then a code that hangs on it
            np.testing.assert_array_less(np.mean(found.cpu().numpy() != data), 0.01)
        values = codec.device.decode(torch.from_numpy(data).to(device), n)
        assert values.device.type == device
        assert values.cpu().numpy().tobytes() == decoded(codec, data, n).tobytes(), f"{n} long"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_tensors_with_nan_or_infinity_are_refused(codec: Codec, bad: float) -> None:
    x = torch.from_numpy(noise(1025))
    x[700] = bad
    with pytest.raises(CodecError) as caught:
        codec.device.encode(x, KEY)
    assert caught.value.code is Code.NON_FINITE


# More values.


@pytest.mark.parametrize("bad", [0x7FC0_0000, 0xFFC0_0000, 0x7F80_0001, 0x7FFF_FFFF, 0x7F80_0000, 0xFF80_0000], ids=hex)
@pytest.mark.parametrize("n", [1, 1025, BLOCK_ELEMENTS])
def test_nan_and_infinity_are_refused_wherever_they_stand(codec: Codec, bad: int, n: int) -> None:
    for place in {0, n // 2, n - 1}:
        x = noise(n)
        x.view(np.uint32)[place] = bad
        with pytest.raises(CodecError) as caught:
            encoded(codec, x)
        assert caught.value.code is Code.NON_FINITE


# Buffers.


@every_length
def test_outputs_are_written_whole_and_inputs_not_at_all(codec: Codec, n: int) -> None:
    x = noise(n)
    data = encoded(codec, x, poison=0x00)
    assert x.tobytes() == noise(n).tobytes()
    assert data.tobytes() == encoded(codec, x, poison=0xFF).tobytes()
    before = data.tobytes()
    codec.check(data, n)
    y = decoded(codec, data, n, poison=np.nan)
    assert data.tobytes() == before
    assert y.tobytes() == decoded(codec, data, n, poison=7.0).tobytes()


@every_length
def test_read_only_inputs_give_the_same(codec: Codec, n: int) -> None:
    x = np.frombuffer(noise(n).tobytes(), np.float32)
    data = np.frombuffer(encoded(codec, x).tobytes(), np.uint8)
    assert not x.flags.writeable
    assert not data.flags.writeable
    assert data.tobytes() == encoded(codec, noise(n)).tobytes()
    codec.check(data, n)
    assert decoded(codec, data, n).tobytes() == decoded(codec, data.copy(), n).tobytes()


@every_length
def test_a_block_inside_a_larger_buffer_leaves_its_neighbours(codec: Codec, n: int) -> None:
    length = codec.encoded_bytes(n)
    for start in (ALIGNMENT_BYTES, 5 * ALIGNMENT_BYTES):
        buffer = np.full(start + length + 64, 0x5A, np.uint8)
        codec.encode(noise(n), buffer[start : start + length], KEY)
        codec.check(buffer[start : start + length], n)
        values = np.full(n + 16, 7.0, np.float32)
        codec.decode(buffer[start : start + length], values[8 : 8 + n])
        assert buffer[start : start + length].tobytes() == encoded(codec, noise(n)).tobytes()
        assert (np.delete(buffer, slice(start, start + length)) == 0x5A).all()
        assert (np.delete(values, slice(8, 8 + n)) == 7.0).all()


def test_a_block_leaves_no_trace_in_the_next(codec: Codec) -> None:
    first = encoded(codec, noise(5001)).tobytes()
    encoded(codec, within(codec, huge(1025)))
    assert encoded(codec, noise(5001)).tobytes() == first


def test_nothing_is_allocated_that_grows_with_the_block(codec: Codec) -> None:
    x = noise(BLOCK_ELEMENTS)
    data, y = encoded(codec, x), np.empty_like(x)

    def exchange() -> None:
        codec.encode(x, data)
        codec.check(data, x.size)
        codec.decode(data, y)

    exchange()  # compiles
    tracemalloc.start()
    try:
        exchange()
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes <= ALLOCATION_BYTES


@every_input
def test_a_thread_that_flushes_subnormals_decodes_to_the_same_bits(codec: Codec, make: Callable[[int], F32]) -> None:
    data = encoded(codec, within(codec, make(5001)))
    expected = decoded(codec, data, 5001).tobytes()
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        flushed = decoded(codec, data, 5001)
    finally:
        torch.set_flush_denormal(False)
    assert flushed.tobytes() == expected


# Bytes from a stranger.


@every_length
def test_any_other_length_is_refused(codec: Codec, n: int) -> None:
    data = encoded(codec, noise(n))
    padded = np.concatenate([data, np.zeros(4096, np.uint8)])
    shorter = {0, 1, data.size // 2, data.size - 4, data.size - 1}
    longer = {data.size + 1, data.size + 2, data.size + 4, padded.size}
    for length in sorted(length for length in shorter | longer if 0 <= length != data.size):
        with pytest.raises(CodecError) as caught:
            codec.check(padded[:length], n)
        assert caught.value.code is Code.BAD_LENGTH


@pytest.mark.parametrize("n", [1, 5, 24])
def test_every_single_flipped_bit_is_refused_or_harmless(codec: Codec, n: int) -> None:
    for make in (noise, huge, denormal):
        data = encoded(codec, within(codec, make(n)))
        for bit in range(8 * data.size):
            flipped = data.copy()
            flipped[bit // 8] ^= 1 << bit % 8
            assert code_of(codec, flipped, n) in {None, *REFUSALS}


@pytest.mark.parametrize("n", [1, 2, 1024, 1025])
def test_every_repeated_byte_is_refused_or_harmless(codec: Codec, n: int) -> None:
    for value in range(256):
        assert code_of(codec, np.full(codec.encoded_bytes(n), value, np.uint8), n) in {None, *REFUSALS}


@given(n=st.integers(1, 3000), seed=st.integers(0, 1 << 32), flips=st.lists(st.integers(0, 1 << 20), max_size=16))
@settings(max_examples=60, deadline=None)
def test_flipped_bits_are_refused_or_harmless(codec: Codec, n: int, seed: int, flips: list[int]) -> None:
    data = encoded(codec, np.random.default_rng(seed).standard_normal(n, dtype=np.float32))
    for flip in flips:
        data[flip // 8 % data.size] ^= 1 << flip % 8
    assert code_of(codec, data, n) in {None, *REFUSALS}


@given(draw=st.data(), n=st.integers(1, 40))
@settings(max_examples=100, deadline=None)
def test_random_bytes_are_refused_or_harmless(codec: Codec, draw: st.DataObject, n: int) -> None:
    length = codec.encoded_bytes(n)
    data = np.frombuffer(draw.draw(st.binary(min_size=length, max_size=length)), np.uint8)
    assert code_of(codec, data, n) in {None, *REFUSALS}


@given(data=st.binary(max_size=64), n=st.integers(1, BLOCK_ELEMENTS))
@settings(max_examples=60, deadline=None)
def test_random_lengths_are_refused_or_harmless(codec: Codec, data: bytes, n: int) -> None:
    code = code_of(codec, np.frombuffer(data, np.uint8), n)
    assert code is Code.BAD_LENGTH or len(data) == codec.encoded_bytes(n)


# What a codec says of itself.


def test_a_codec_describes_itself(codec: Codec) -> None:
    assert codecs.load(codec.name) is codec
    assert all((codec.summary, codec.paper, codec.when, codec.bytes_per_element))
    assert codec.stochastic or not codec.unbiased or codec.lossless
    assert codec.remembers <= (codec.feedback != "never")
    assert codec.unbiased or not codec.lossless
    assert codec.tolerance == 0 or not (codec.same_bytes or codec.lossless)
    assert codecs.load(codec.dense).dense == codec.dense, "what is sent dense needs no other codec in turn"


def test_a_misspelt_name_is_answered_with_the_nearest_and_all_there_are(codec: Codec) -> None:
    name = codecs.words(codec.name)[-1]
    with pytest.raises(ConfigError) as caught:
        codecs.load(f"{name}x")
    assert f"did you mean '{name}'?" in caught.value.sentence
    assert all(known in caught.value.fix for known in codecs.names())


def test_encoded_bytes_grow_with_the_block(codec: Codec) -> None:
    lengths: list[Any] = [codec.encoded_bytes(n) for n in LENGTHS]
    assert all(type(length) is int and length > 0 for length in lengths)
    assert lengths == sorted(lengths)


@pytest.mark.parametrize("weight", [1.0, 0.1, -3.7])
def test_adding_at_once_is_decoding_and_adding_to_the_bit(codec: Codec, weight: float) -> None:
    if codec.add is None:
        pytest.skip("decodes first")
    for n in LENGTHS:
        for make in (noise, denormal, one_hot):
            data, c = encoded(codec, within(codec, make(n))), noise(n)
            expected = c + np.float32(weight) * decoded(codec, data, n)
            untouched = c.copy()
            for out, size in ((np.zeros(0, np.float32), 0), (np.full(n, np.nan, np.float32), 0), (far(n), FAR_BYTES)):
                c[:] = untouched
                assert codec.add(data, c, np.float32(weight), out, size)
                assert (c.view(np.uint32) == expected.view(np.uint32)).all(), (n, make)
                assert (out.view(np.uint32) == expected[: out.size].view(np.uint32)).all(), (n, make)


def test_adding_tells_of_what_is_no_longer_finite(codec: Codec) -> None:
    if codec.add is None:
        pytest.skip("decodes first")
    for at in (0, 4095, 4096, 9999):
        data, c = encoded(codec, np.ones(10_000, np.float32)), np.zeros(10_000, np.float32)
        c[at] = np.inf
        assert not codec.add(data, c, np.float32(1.0), c[:0], 0)


def far(n: int) -> F32:
    """(n,) where a kernel may write past the caches."""
    whole = np.full(n + ALIGNED_BYTES // 4, np.nan, np.float32)
    first = -whole.ctypes.data % ALIGNED_BYTES // 4
    return whole[first : first + n]


def test_a_seamless_codec_sees_no_seam(codec: Codec) -> None:
    if not codec.seamless or codec.stochastic:
        pytest.skip("has seams")
    x = noise(3 * 1024)
    parts = np.concatenate([encoded(codec, x[:2048]), encoded(codec, x[2048:])])
    assert (encoded(codec, x) == parts).all()
    assert (
        decoded(codec, parts, x.size)
        == np.concatenate([decoded(codec, encoded(codec, p), p.size) for p in (x[:2048], x[2048:])])
    ).all()
