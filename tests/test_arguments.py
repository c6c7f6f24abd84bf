"""The checks of arguments: what they take, what they refuse, and with which words."""

from __future__ import annotations

import fractions
import pathlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lrmanifold import _arguments as a

NUMBERS = [2, 2.0, np.float32(2), np.float64(2), np.int64(2), np.uint8(2), fractions.Fraction(2)]
NO_NUMBERS = [None, True, np.True_, "2", b"2", [2], (2,), {}, 2j, np.ones(1), torch.tensor(2.0)]


@pytest.mark.parametrize("value", NUMBERS)
def test_numbers_of_python_and_numpy_are_numbers(value):
    number = a.check_number("x", value, low=0, high=2)
    assert type(number) is float
    assert number == 2.0


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
@pytest.mark.parametrize("check", [a.check_number, a.check_integer])
def test_what_is_no_number_is_a_type_error_that_says_so(check, value):
    with pytest.raises(TypeError, match=r"^size must be an? .*, got "):
        check("size", value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 10**400])
def test_numbers_are_finite(value):
    with pytest.raises(ValueError, match=r"^size must be a finite number, got "):
        a.check_number("size", value)


def test_infinite_numbers_where_they_are_allowed():
    assert a.check_number("x", float("inf"), low=0, infinite=True) == float("inf")
    with pytest.raises(ValueError, match=r"x must be a number >= 0, got nan"):
        a.check_number("x", float("nan"), low=0, infinite=True)


@given(value=st.floats(-3, 3), open_low=st.booleans(), open_high=st.booleans())
def test_ranges(value, open_low, open_high):
    inside = (value > -1 if open_low else value >= -1) and (value < 1 if open_high else value <= 1)
    options = {"low": -1, "high": 1, "open_low": open_low, "open_high": open_high}
    if inside:
        assert a.check_number("x", value, **options) == value
    else:
        left, right = "(" if open_low else "[", ")" if open_high else "]"
        with pytest.raises(ValueError, match=r"in .-1, 1., got") as found:
            a.check_number("x", value, **options)
        assert f"in {left}-1, 1{right}, got" in str(found.value)


@pytest.mark.parametrize("value", [2, np.int64(2), np.uint8(2)])
def test_integers_of_python_and_numpy_are_integers(value):
    assert type(a.check_integer("x", value, low=1, high=3)) is int


def test_integers_beyond_the_range():
    for value in (0, 4, -(2**70)):
        with pytest.raises(ValueError, match=r"^x must be an integer in 1\.\.3, got"):
            a.check_integer("x", value, low=1, high=3)
    with pytest.raises(TypeError, match=r"^x must be an integer >= 1, got 2\.0"):
        a.check_integer("x", 2.0, low=1)


def test_rates_may_be_tensors_without_dimensions(device):
    rate = torch.tensor(0.1, device=device)
    assert a.check_rate("lr", rate) is rate
    assert a.check_rate("lr", np.float32(0.5)) == 0.5
    meta = torch.tensor(-1.0, device="meta")
    assert a.check_rate("lr", meta) is meta  # never read off the host
    for bad in (torch.ones(1), torch.tensor(-1.0), torch.tensor(float("nan"))):
        with pytest.raises(ValueError, match=r"^lr must be a finite number >= 0 or a tensor"):
            a.check_rate("lr", bad)
    for bad in (torch.tensor(True), torch.tensor(1j)):
        with pytest.raises(TypeError, match=r"^lr must be"):
            a.check_rate("lr", bad)


def test_several_numbers():
    assert a.check_numbers("betas", [np.float32(0.5), 0], 2, low=0, high=1) == (0.5, 0.0)
    with pytest.raises(ValueError, match=r"betas must be 2 finite numbers in \[0, 1\)"):
        a.check_numbers("betas", (0.5,), 2, low=0, high=1, open_high=True)
    with pytest.raises(ValueError, match=r"betas\[1\] must be .*got 1\.5"):
        a.check_numbers("betas", (0.5, 1.5), 2, low=0, high=1)
    with pytest.raises(TypeError, match=r"betas must be 2 finite numbers"):
        a.check_numbers("betas", 0.5, 2, low=0, high=1)


def test_flags_are_true_or_false():
    assert a.check_flag("bias", np.False_) is False
    for value in (0, 1, None, "no", [], torch.tensor(True)):
        with pytest.raises(TypeError, match=r"^bias must be True or False, got"):
            a.check_flag("bias", value)


def test_choices():
    assert a.check_choice("init", "svd", ("svd", "random")) == "svd"
    with pytest.raises(ValueError, match=r"^init must be 'svd' or 'random', got 'zero'"):
        a.check_choice("init", "zero", ("svd", "random"))
    with pytest.raises(TypeError, match=r"^m must be one of 'a', 'b', 'c', got 0"):
        a.check_choice("m", 0, ("a", "b", "c"))
    with pytest.raises(ValueError, match=r"^m must be one of 'a', 'b', or a function, got 'x'"):
        a.check_choice("m", "x", ("a", "b"), or_="a function")


def test_patterns_are_one_string_or_several():
    assert a.check_patterns("include", None) is None
    assert a.check_patterns("include", "fc*") == ("fc*",)
    assert a.check_patterns("include", ["a", "b"]) == ("a", "b")
    for value in (3, b"a", {"a": 1}, torch.ones(2), nn.Linear(1, 1), ["a", 3]):
        with pytest.raises(TypeError, match=r"^include must be a string or a sequence of strings"):
            a.check_patterns("include", value)


def test_modules_callables_paths_and_objects():
    model = nn.Linear(2, 2)
    assert a.check_module("model", model) is model
    for value in (None, 3, [model], model.weight, "model"):
        with pytest.raises(TypeError, match=r"^model must be a torch\.nn\.Module, got"):
            a.check_module("model", value)
    with pytest.raises(TypeError, match=r"got the class Linear: make an object of it first"):
        a.check_module("model", nn.Linear)
    assert a.check_callable("loss", len) is len
    with pytest.raises(TypeError, match=r"^loss must be a function, got 3"):
        a.check_callable("loss", 3)
    assert a.check_path("path", pathlib.Path("x")) == "x"
    for value in (b"x", 3, None):
        with pytest.raises(TypeError, match=r"^path must be a path"):
            a.check_path("path", value)
    for value in ("", "a\0b"):
        with pytest.raises(ValueError, match=r"^path must be a path"):
            a.check_path("path", value)


def test_tensors_devices_and_dtypes():
    x = torch.ones(2, 3)
    assert a.check_tensor("x", x, shape=(None, 3)) is x
    with pytest.raises(ValueError, match=r"^x must be a tensor of shape \(\*, 4\), got"):
        a.check_tensor("x", x, shape=(None, 4))
    for bad in (x.long(), x.cfloat(), np.ones(2), [1.0]):
        with pytest.raises(TypeError, match=r"^x must be a real floating point tensor, got"):
            a.check_tensor("x", bad)
    with pytest.raises(TypeError, match=r"dtype float64, got a tensor of shape"):
        a.check_tensor("x", x, dtypes=(torch.float64,))
    assert a.check_device("device", "meta") == torch.device("meta")
    assert a.check_device("device", None) is None
    with pytest.raises(ValueError, match=r"^device must be a torch.device or its name"):
        a.check_device("device", "toaster")
    with pytest.raises(TypeError, match=r"^device must be a torch.device or its name"):
        a.check_device("device", 1.5)
    assert a.check_dtype("dtype", torch.float32, (torch.float32,)) is torch.float32
    with pytest.raises(TypeError, match=r"^dtype must be one of torch.float32, got 'float32'"):
        a.check_dtype("dtype", "float32", (torch.float32,))


def test_messages_are_short_and_never_fail():
    class Odd:
        def __repr__(self):
            raise RuntimeError

    for value in (Odd(), torch.ones(100, 100), np.ones(1000), list(range(10**5)), "x" * 10**5):
        with pytest.raises(TypeError) as found:
            a.check_number("x", value)
        assert len(str(found.value)) < 200
