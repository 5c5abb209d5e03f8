"""Block formats: codes against a loop of a few lines, and what holds for any numbers, axis, block and sub-block."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drafters.mx import encoding
from drafters.mx.encoding import decode, encode, quantise
from drafters.mx.formats import FORMATS, BlockFormat
from drafters.mx.other_formats import float8, scaled_integers
from drafters.mx.qsnr import gaussian_vectors, qsnr

MX9, MX6, MX4, MSFP16 = (FORMATS[name] for name in ("MX9", "MX6", "MX4", "MSFP16"))


def loop_written(values, format):
    """The integers, exponents and shifts of one vector."""
    integers, exponents, shifts = [], [], []
    for first in range(0, len(values), format.k1):
        block = values[first : first + format.k1]
        inner = [block[i : i + format.k2] for i in range(0, len(block), format.k2)]
        largest = [max((math.frexp(v)[1] - 1 for v in part if v), default=-1000) for part in inner]
        exponent = min(max(*largest, -127, -1000), 127)
        exponents.append(exponent)
        for part, own in zip(inner, largest, strict=True):
            shift = min(max(exponent - own, 0), 2**format.d2 - 1)
            shifts.append(shift)
            step = 2.0 ** (exponent - shift - (format.m - 1))
            integers += [max(-(2**format.m - 1), min(2**format.m - 1, round(v / step))) for v in part]
    return integers, exponents, shifts


sizes = st.builds(
    lambda k2, times, d2, m: BlockFormat("any", k1=k2 * times, d1=8, k2=k2 if d2 else k2 * times, d2=d2, m=m),
    k2=st.sampled_from([1, 2, 3, 4]), times=st.sampled_from([1, 2, 8]), d2=st.integers(0, 3), m=st.integers(1, 10),
)  # fmt: skip
numbers = st.floats(allow_nan=False, allow_infinity=False, width=32)
"""subnormal ones too"""
near = st.builds(lambda digits, exponent: digits * 2.0**exponent, st.integers(-300, 300), st.integers(-12, 4))
"""of about one size, among them many ties"""
vectors = st.one_of(st.lists(numbers, min_size=1, max_size=70), st.lists(near, min_size=1, max_size=70))


@settings(deadline=None, max_examples=300)
@given(format=sizes, values=vectors)
def test_codes_are_those_of_a_loop(format, values):
    codes = encode(torch.tensor(values), format)
    assert (codes.integers.tolist(), codes.exponents.tolist(), codes.shifts.tolist()) == loop_written(values, format)


@settings(deadline=None, max_examples=300)
@given(format=sizes, values=vectors)
def test_an_error_is_at_most_half_a_step_or_a_whole_one_where_the_largest_integer_ends_the_range(format, values):
    x = torch.tensor(values, dtype=torch.float64)
    codes = encode(x, format)
    step = decode(encoding.Codes(format, -1, torch.ones_like(codes.integers), codes.exponents, codes.shifts), x.dtype)
    clipped = codes.integers.abs() == format.largest_integer
    error = (decode(codes, x.dtype) - x).abs() / step
    assert (error <= torch.where(clipped, 1.0, 0.5)).all()


@settings(deadline=None, max_examples=300)
@given(format=sizes, values=vectors)
def test_quantising_twice_is_quantising_once(format, values):
    once = quantise(torch.tensor(values, dtype=torch.float64), format)
    assert torch.equal(quantise(once, format), once)


@settings(deadline=None, max_examples=300)
@given(format=sizes, values=st.lists(near, min_size=1, max_size=70))
def test_the_qsnr_is_never_below_the_bound(format, values):
    x = torch.tensor(values, dtype=torch.float64)
    if x.any():
        assert qsnr(x, quantise(x, format)) >= format.bound_db(len(values)) - 1e-9


@pytest.mark.parametrize("name", FORMATS)
def test_the_worst_vector_has_the_noise_of_the_bound(name):
    """The largest element is hardly above a power of two, and every element is half a step off."""
    format = FORMATS[name]
    x = torch.full((format.k1,), 2.0 ** -(format.m + format.largest_shift), dtype=torch.float64)
    x[: format.k2] = 2.0**-format.m
    x[0] += 1.0
    noise = (quantise(x, format) - x).square().sum().item()
    assert -10 * math.log10(noise) == pytest.approx(format.bound_db(format.k1))


@pytest.mark.parametrize("k2", [1, 2, 4, 16])
def test_more_bits_of_magnitude_mean_less_noise(k2):
    x = gaussian_vectors(50, 100, seed=1)
    for d2 in (0, 1, 2) if k2 == 16 else (1, 2):
        found = [qsnr(x, quantise(x, BlockFormat("any", 16, 8, k2, d2, m))) for m in range(1, 12)]
        assert all(4 < more - less < 8 for less, more in itertools.pairwise(found))


def test_quantising_and_transposing_do_not_commute():
    weight = gaussian_vectors(64, 64, seed=2)
    assert not torch.equal(quantise(weight.T, MX6).T, quantise(weight, MX6))
    assert torch.equal(quantise(weight.T, MX6, axis=0).T, quantise(weight, MX6))


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 37])
def test_any_axis_and_a_ragged_end(axis, length):
    shape = [3, 4, 5]
    shape[axis] = length
    x = torch.randn(shape, generator=torch.Generator().manual_seed(length))
    codes, found = encode(x, MX6, axis), quantise(x, MX6, axis)
    assert codes.integers.shape == found.shape == x.shape
    assert codes.exponents.shape[axis] == math.ceil(length / 16)
    assert codes.shifts.shape[axis] == math.ceil(length / 2)
    one = x.movedim(axis, -1).flatten(0, 1)[7]
    integers, exponents, shifts = (
        part.movedim(axis, -1).flatten(0, 1)[7].tolist() for part in (codes.integers, codes.exponents, codes.shifts)
    )
    assert (integers, exponents, shifts) == loop_written(one.tolist(), MX6)


def test_a_block_by_hand():
    """In MX4 the step of the first pair is 1/2, since 1.75 has the block's exponent 0; that of all others is 1/4."""
    x = torch.tensor([1.75, 0.3, 0.8, -0.3, 0.125, -0.375, 0.0, 0.1])
    codes = encode(x, MX4)
    assert codes.exponents.tolist() == [0]
    assert codes.shifts.tolist() == [0, 1, 1, 1]
    assert codes.integers.tolist() == [3, 1, 3, -1, 0, -2, 0, 0]  # 0.125 and -0.375 are ties, and go to even
    assert decode(codes).tolist() == [1.5, 0.5, 0.75, -0.25, 0.0, -0.5, 0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtype_and_zeros_stay(dtype):
    zeros = torch.zeros(40, dtype=dtype)
    codes = encode(zeros, MX9)
    assert codes.exponents.unique().tolist() == [-127]
    assert codes.shifts.unique().tolist() == [1]
    assert torch.equal(quantise(zeros, MX9), zeros)
    x = gaussian_vectors(10, 40, seed=3).to(dtype)
    found = quantise(x, MX9)
    assert found.dtype == dtype
    assert torch.equal(found.double(), quantise(x.double(), MX9)), "every value of MX9 is one of the dtype"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ends_of_the_exponent(dtype):
    """Subnormal numbers keep the step of 2^-127, and the largest number saturates at the largest integer."""
    tiny = torch.tensor([2.0**-127, 2.0**-130, 2.0**-133], dtype=torch.float64).to(dtype)
    codes = encode(tiny, MX9)
    assert codes.exponents.tolist() == [-127]
    assert torch.equal(decode(codes, torch.float64), tiny.double()), "2^-133 is the step of the first pair"
    less = torch.full((16,), 2.0**-149)
    assert encode(less, MX9).integers.unique().tolist() == [0]
    assert quantise(less, MX9).unique().tolist() == [0.0]
    top = torch.tensor([torch.finfo(dtype).max, -torch.finfo(dtype).max], dtype=dtype)
    codes = encode(top, MX9)
    assert (codes.exponents.tolist(), codes.integers.tolist()) == ([127], [127, -127])
    assert decode(codes).tolist() == [127 * 2.0**121, -127 * 2.0**121]


def test_a_narrow_exponent_saturates():
    narrow = BlockFormat("narrow", k1=4, d1=3, k2=2, d2=1, m=4)
    assert quantise(torch.tensor([100.0, 1.0]), narrow).tolist() == [15.0, 1.0]  # the largest exponent is 3


@pytest.mark.parametrize("unfit", [math.nan, math.inf, -math.inf])
def test_infinity_and_nan_are_refused(unfit):
    with pytest.raises(ValueError, match="MX4 has no infinity and no NaN, and 2 of 20 numbers are such"):
        encode(torch.tensor([1.0] * 18 + [unfit] * 2), MX4)


@pytest.mark.parametrize(
    ("field", "sizes"),
    [("k2", (16, 8, 3, 1, 2)), ("k2", (16, 8, 2, 0, 2)), ("d1", (16, 9, 2, 1, 2)), ("m", (16, 8, 2, 1, 0)),
     ("d2", (16, 8, 2, 5, 2))],
)  # fmt: skip
def test_a_format_whose_sizes_do_not_fit_names_the_field(field, sizes):
    with pytest.raises(ValueError, match=f"^{field}: "):
        BlockFormat("wrong", *sizes)


def test_bits_and_bounds_of_the_named_formats():
    assert {f.name: f.bits for f in FORMATS.values()} == {"MX9": 9, "MX6": 6, "MX4": 4, "MSFP16": 8.5, "MSFP12": 4.5}
    assert [round(FORMATS[name].bound_db(256), 2) for name in ("MX9", "MX6", "MX4")] == [34.74, 16.68, 4.64]
    assert MX9.bound_db(2) == pytest.approx(20 * 7 * math.log10(2) + 10 * math.log10(4 / (2 + 3 * 2)))


KNOWN = {"MX9": 46.61, "MX6": 28.37, "MX4": 15.77, "MSFP16": 42.99, "MSFP12": 18.85}
"""dB on 10,000 vectors, where each encoder was a prototype's"""


@pytest.fixture(scope="module")
def vectors_of_variable_variance():
    return gaussian_vectors(10_000, 256, seed=0)


@pytest.mark.parametrize("name", KNOWN)
def test_the_qsnr_on_gaussian_vectors_is_the_known_one(name, vectors_of_variable_variance):
    x = vectors_of_variable_variance
    assert qsnr(x, quantise(x, FORMATS[name])) == pytest.approx(KNOWN[name], abs=0.1)


def test_mx9_has_less_noise_than_msfp16_and_float8(vectors_of_variable_variance):
    x = vectors_of_variable_variance
    mx9 = qsnr(x, quantise(x, MX9))
    assert mx9 - qsnr(x, quantise(x, MSFP16)) > 3.5
    assert mx9 - qsnr(x, float8(x, "E4M3")) > 14.5
    assert qsnr(x, float8(x, "E5M2")) < qsnr(x, quantise(x, MX6)) < qsnr(x, float8(x, "E4M3"))


def test_the_formats_to_compare_with(vectors_of_variable_variance):
    x = vectors_of_variable_variance
    assert qsnr(x, float8(x, "E4M3")) == pytest.approx(31.53, abs=0.1)
    assert qsnr(x, float8(x, "E5M2")) == pytest.approx(25.57, abs=0.1)
    assert qsnr(x, scaled_integers(x, 8, 256)) == pytest.approx(43.15, abs=0.1)
    by_hand = scaled_integers(torch.tensor([7.0, -3.4, 0.5, 14.0, 3.1]), 4, 3)  # scales 1 and 2; 0.5 is a tie
    assert by_hand.tolist() == [7.0, -3.0, 0.0, 14.0, 4.0]
    assert torch.equal(scaled_integers(x[:7].T, 4, 32, axis=0).T, scaled_integers(x[:7], 4, 32))
    zeros = torch.zeros(5)
    assert torch.equal(scaled_integers(zeros, 4, 2), zeros)
    assert torch.equal(float8(zeros, "E4M3"), zeros)


def test_the_tests_would_find_a_shift_taken_from_the_smaller_element(monkeypatch):
    """Where one element of a pair is below the block's exponent, a shift would clip the other."""
    amax = torch.Tensor.amax

    def smaller_of_a_pair(x, axis, keepdim=False):
        return x.amin(axis) if x.shape[-1] == 2 and not keepdim else amax(x, axis, keepdim=keepdim)

    x = gaussian_vectors(200, 256, seed=0)
    right = quantise(x, MX6)
    monkeypatch.setattr(torch.Tensor, "amax", smaller_of_a_pair)
    wrong = quantise(x, MX6)
    assert qsnr(x, wrong) < MX6.bound_db(256) < qsnr(x, right)
