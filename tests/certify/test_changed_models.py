"""Models that were changed behind a layer's or a report's back, and models that cannot be followed.

Each test is one that once got a bound too small, a report that was out of date, or another error.
"""

from __future__ import annotations

import functools
import types
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lrmanifold import certify
from lrmanifold.nn import LowRankConv1d, LowRankConv2d

D = torch.float64


@given(
    st.sampled_from(("reflect", "replicate", "circular")),
    st.integers(0, 2),
    st.integers(0, 2),
    st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_padding_that_was_changed_later_is_seen(mode, before, after, low_rank):
    """But for zeros torch pads by numbers of its own, which a later change does not reach."""
    kind = {"bias": False, "padding": before, "padding_mode": mode}
    layer = LowRankConv1d(1, 1, 3, 1, **kind) if low_rank else nn.Conv1d(1, 1, 3, **kind)
    layer = layer.double()
    layer.padding = (after,)
    if before != after:
        with pytest.raises(certify.BoundError, match="padding was changed"):
            certify.lipschitz(layer, (1, 5))
        return
    J = layer(torch.eye(5, dtype=D)[:, None]).flatten(1).detach()
    assert certify.lipschitz(layer, (1, 5)).total >= float(torch.linalg.matrix_norm(J, 2))


class Loud(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def __call__(self, x):
        return 50 * super().__call__(x)

    def forward(self, x):
        return self.layer(x)


def test_a_call_of_ones_own_is_refused():
    for model in (Loud(), nn.Sequential(Loud())):
        with pytest.raises(certify.BoundError, match="own __call__"):
            certify.lipschitz(model)


class Settings(nn.Module):
    """Holds what its forward uses in a dict, a list and a function."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.sizes = {"scale": 1.0}
        self.shifts = [torch.ones(2)]
        self.act = lambda x: torch.tanh(x)

    def forward(self, x):
        return self.act(self.layer(x) * self.sizes["scale"]) - self.shifts[0]


def grow_dict(model):
    model.sizes["scale"] = 9.0


def grow_list(model):
    model.shifts[0] += 9.0


def other_function(model):
    model.act = lambda x: 9 * x


@pytest.mark.parametrize("change", [grow_dict, grow_list, other_function])
def test_a_report_is_stale_after_a_change_of_what_is_no_plain_number(change):
    model, x = Settings(), torch.rand(3, 2)
    report = certify.lipschitz(model, (2,))
    certify.radius(model, x, bound=report)
    change(model)
    with pytest.raises(ValueError, match="make it anew"):
        certify.radius(model, x, bound=report)


def test_hooks_of_all_modules_are_seen_with_a_report_from_before():
    model, x = nn.Sequential(nn.Linear(2, 2)), torch.rand(3, 2)
    report = certify.lipschitz(model, (2,))
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: -9 * out)
    try:
        with pytest.raises(certify.BoundError, match="hooks for all modules"):
            certify.radius(model, x, bound=report)
    finally:
        handle.remove()


def test_what_has_no_weights_or_cannot_be_copied_is_told():
    with pytest.raises(certify.BoundError, match=r"LazyLinear.*run a batch"):
        certify.lipschitz(nn.Sequential(nn.LazyLinear(3)), (2,))
    model = nn.Sequential(nn.Linear(2, 2))
    model.seen = model(torch.ones(1, 2))
    with pytest.raises(certify.BoundError, match="cannot be copied"):
        certify.lipschitz(model, (2,))


def test_a_model_that_gives_a_size_is_refused():
    class Size(nn.Module):
        def forward(self, x):
            return x.size(0)

    for shape in (None, (2,)):
        with pytest.raises(certify.BoundError, match="one tensor"):
            certify.lipschitz(Size(), shape)


def test_without_parameters_the_trace_is_compared_in_float64_too():
    class Nearly(nn.Module):
        def forward(self, x):
            return x * 1.005 if isinstance(x, torch.Tensor) else x

    with pytest.raises(certify.BoundError, match="trace does not see"):
        certify.lipschitz(Nearly(), (2,))


@pytest.mark.parametrize("shape", [(5, 4), (2, 5, 4)])
@pytest.mark.parametrize("pad", [nn.ReflectionPad2d(1), nn.CircularPad2d((2, 1, 0, 3))], ids=repr)
def test_padding_of_images_without_channels(pad, shape):
    n = torch.Size(shape).numel()
    J = torch.stack([pad(e.view(1, *shape)).flatten() for e in torch.eye(n, dtype=D)])
    true = float(torch.linalg.matrix_norm(J, 2))
    assert true * (1 - 1e-12) <= certify.lipschitz(pad, shape).total <= true * 1.5


@dataclass
class Setting:
    scale: float = 1.0


class Held(nn.Module):
    """Reads what a class, a namespace, a data class and a partial hold."""

    shift = 0.0

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.space, self.setting = types.SimpleNamespace(scale=1.0), Setting()
        self.act = functools.partial(nn.functional.leaky_relu, negative_slope=0.5)

    def forward(self, x):
        x = self.act(self.layer(x) * self.space.scale) * self.setting.scale
        return x + self.shift


def other_class_attribute(model, patch):
    patch.setattr(Held, "shift", 9.0)


def other_method(model, patch):
    patch.setattr(Held, "forward", lambda self, x: 9 * self.layer(x))


def other_namespace(model, patch):
    model.space.scale = 9.0


def other_data_class(model, patch):
    model.setting.scale = 9.0


def other_partial(model, patch):
    model.act = functools.partial(nn.functional.leaky_relu, negative_slope=9.0)


HOLDERS = [other_class_attribute, other_method, other_namespace, other_data_class, other_partial]


@pytest.mark.parametrize("change", HOLDERS)
def test_a_report_is_stale_after_a_change_of_what_a_class_or_a_holder_of_values_has(
    change, monkeypatch
):
    model, x = Held(), torch.rand(3, 2)
    report = certify.lipschitz(model, (2,))
    certify.radius(model, x, bound=report)
    change(model, monkeypatch)
    with pytest.raises(ValueError, match="make it anew"):
        certify.radius(model, x, bound=report)


@pytest.mark.parametrize("shared", ["module", "weight"])
def test_a_report_is_stale_after_another_layer_is_shared(shared):
    """Each module and tensor under its first name: that list stays as it is."""
    model, x = nn.Sequential(*(nn.Linear(2, 2) for _ in range(3))), torch.rand(3, 2)

    def share(i):
        if shared == "module":
            model[2] = model[i]
        else:
            model[2].weight, model[2].bias = model[i].weight, model[i].bias

    share(0)
    report = certify.lipschitz(model, (2,))
    certify.radius(model, x, bound=report)
    share(1)
    with pytest.raises(ValueError, match="make it anew"):
        certify.radius(model, x, bound=report)


def changed(layer, **values):
    for key, value in values.items():
        setattr(layer, key, value)
    return layer


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (changed(nn.Conv2d(1, 1, 3), stride=2), r"stride was changed to 2 .* \(2, 2\)"),
        (changed(nn.Conv2d(1, 1, 3), padding=1), r"padding was changed to 1 .* \(1, 1\)"),
        (changed(LowRankConv2d(1, 1, 3, 1), dilation=2), r"dilation was changed to 2"),
        (nn.ReflectionPad2d(9), "does not take an image of"),
        (torch.jit.script(nn.Sequential(nn.Linear(4, 4))), "own forward"),
    ],
    ids=["stride", "padding", "dilation", "image", "script"],
)
def test_what_once_ended_in_an_error_of_python_is_named(model, words):
    with pytest.raises(certify.BoundError, match=words):
        certify.lipschitz(model, (1, 4, 4))


def test_functions_with_wrong_arguments_and_constants_without_entries_are_named():
    class Wrong(nn.Module):
        def forward(self, x):
            return nn.functional.hardtanh(x, 1.0, -1.0)

    class Empty(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.ones(1, 0))

        def forward(self, x):
            return x * self.scale

    with pytest.raises(certify.BoundError, match="hardtanh does not take"):
        certify.lipschitz(Wrong(), (2,))
    with pytest.raises(certify.BoundError, match=r"a constant of shape \(1, 0\) has no entry"):
        certify.lipschitz(Empty(), (2,))


def test_an_image_of_which_nothing_is_left_has_the_constant_0():
    assert certify.lipschitz(nn.ReplicationPad2d((0, 0, -1, -1)), (1, 2, 3)).total == 0.0


def test_a_report_is_good_in_another_process():
    """Where the same classes have other functions, made from the same code."""

    def made():
        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(2, 2)

            @property
            def factor(self):
                return 2.0

            def forward(self, x):
                return self.factor * self.layer(x)

        torch.manual_seed(0)
        return Twice()

    report = certify.lipschitz(made(), (2,))
    certify.radius(made(), torch.rand(3, 2), bound=report)


class Gained(nn.Parameter):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        out = super().__torch_function__(func, types, args, kwargs or {})
        return 10 * out if func is nn.functional.linear else out


class Fresh(nn.Linear):
    def __deepcopy__(self, memo):
        new = type(self)(self.in_features, self.out_features)
        nn.init.eye_(new.weight)
        return new


class Forgets(nn.Module):
    """``deepcopy`` takes another factor."""

    def __init__(self, factor=10.0):
        super().__init__()
        self.layer, self.factor = nn.Linear(2, 2), factor

    def __deepcopy__(self, memo):
        new = Forgets(1.0)
        new.load_state_dict(self.state_dict())
        return new

    def forward(self, x):
        return self.factor * self.layer(x)


class Called(nn.Module):
    def _call_impl(self, x):
        return 100 * super()._call_impl(x)

    def forward(self, x):
        return -x


def own_arithmetic():
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].weight = Gained(torch.eye(2))
    return model


def own_call():
    model = nn.Sequential(nn.ReLU())
    model[0]._call_impl = lambda x: 10 * x
    return model


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (own_arithmetic(), "weight is a Gained, a tensor with arithmetic of its own"),
        (nn.Sequential(Fresh(2, 2)), r"copying the model changes 0\.weight"),
        (Forgets(), "does not give what the model gives"),
        (Called(), "own __call__ or _call_impl"),
        (own_call(), "own __call__ or _call_impl"),
        (nn.Sequential(nn.Linear(2, 2).requires_grad_(False)), "weight must be dense"),
    ],
    ids=["arithmetic", "deepcopy", "attribute", "call", "own call", "sparse"],
)
def test_what_a_copy_in_float64_would_lose_is_refused(model, words):
    if "dense" in words:
        model[0].weight = nn.Parameter(model[0].weight.to_sparse(), requires_grad=False)
    with pytest.raises(certify.BoundError, match=words):
        certify.lipschitz(model, (2,))


def test_half_precision_and_mixed_dtypes_have_bounds():
    """Where there is nothing that the copy could be compared with."""
    for model in (
        nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).half(),
        nn.Sequential(nn.Linear(2, 2).double(), nn.Linear(2, 2)),
    ):
        assert certify.lipschitz(model, (2,)).total > 0
