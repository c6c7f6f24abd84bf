"""An optimizer built before factorize is warned of; programs that are right never are."""

import copy
import gc
import warnings

import pytest
import torch
from torch import nn
from torch.utils.weak import TensorWeakRef

import lrmanifold as lrm


def dense(device):
    return nn.Sequential(nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 5)).to(device)


def step(model, *optimizers):
    for optimizer in optimizers:
        optimizer.zero_grad()
    device = next(model.parameters()).device
    model(torch.randn(8, 20, device=device)).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()


def silent(work):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        work()


MAKERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1),
    "CondLR": lambda p: lrm.optim.CondLR(p, lr=0.1),
}


@pytest.mark.parametrize("name", ["SGD", "AdamW", "CondLR"])
def test_an_optimizer_built_before_factorize_is_warned_of_once(name, device):
    model = dense(device)
    optimizer = MAKERS[name](model.parameters())
    step(model, optimizer)  # trained on dense weights first
    model = lrm.factorize(model, rank=4, exclude="2")
    silent(lambda: step(model, optimizer))  # another optimizer may still come
    with pytest.warns(UserWarning, match=f"{name} was built before factorize.*: 1 of its"):
        step(model, optimizer)
    silent(lambda: [step(model, optimizer) for _ in range(3)])


def test_so_is_one_built_before_densify(device):
    model = lrm.factorize(dense(device), rank=4, exclude="2")
    optimizer = lrm.optim.CondLR(model.parameters(), lr=0.1)
    model = lrm.densify(model)
    step(model, optimizer)
    with pytest.warns(UserWarning, match="they do not move"):
        step(model, optimizer)


def test_so_is_one_built_before_adapt(device):
    model = dense(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    lrm.nn.adapt(model, rank=2)
    step(model, optimizer)
    with pytest.warns(UserWarning, match=r"adapt or set_adapter: .*they do not move"):
        step(model, optimizer)


def tuned(model):
    return lrm.optim.CondLR([p for p in model.parameters() if p.requires_grad], lr=0.1)


@pytest.mark.parametrize("switch", [False, True])
def test_so_is_one_of_an_adapter_that_rests_now(switch, device):
    model = lrm.nn.adapt(dense(device), rank=2, include="0", name="first")
    optimizer = tuned(model)
    silent(lambda: [step(model, optimizer) for _ in range(3)])
    lrm.nn.adapt(model, rank=2, include="0", name="second")
    if switch:
        optimizer = tuned(model)
        silent(lambda: [step(model, optimizer) for _ in range(3)])
        lrm.nn.set_adapter(model, "first")
    step(model, optimizer)
    with pytest.warns(UserWarning, match="they do not move"):
        step(model, optimizer)


def test_attention_and_accumulated_gradients_too(device):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).to(device)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
    layer = lrm.factorize(layer, rank=4)

    def train():
        for i in range(6):
            layer(torch.randn(2, 3, 16, device=device)).square().mean().backward()
            if i % 3 == 2:
                optimizer.step()
                optimizer.zero_grad()

    with pytest.warns(UserWarning, match="they do not move"):
        train()


def frozen(device):
    model = dense(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model = lrm.factorize(model, rank=4, exclude="2")
    model[0].weight.requires_grad_(False)
    return model, [optimizer]


def one_for_each_part(device):
    model = dense(device)
    rest = torch.optim.SGD(model.parameters(), lr=0.1)  # biases and head are still its own
    model = lrm.factorize(model, rank=4, exclude="2")
    return model, [rest, lrm.optim.CondLR([model[0].weight], lr=0.1)]


def the_other_one_first(device):
    model, optimizers = one_for_each_part(device)
    return model, optimizers[::-1]


def old_one_kept(device):
    model = dense(device)
    old = torch.optim.SGD(model.parameters(), lr=0.1)
    model = lrm.factorize(model, rank=4, exclude="2")
    model.old = [old]
    return model, [lrm.optim.CondLR(model.parameters(), lr=0.1)]


def adapters_beside(device):
    model = dense(device)
    rest = torch.optim.SGD(model.parameters(), lr=0.1)
    lrm.nn.adapt(model, rank=2)
    model[2].requires_grad_(True)
    updates = [p for name, p in model.named_parameters() if p.requires_grad and "2." not in name]
    return model, [rest, lrm.optim.CondLR(updates, lr=0.1)]


def one_for_each_adapter(device):
    model = lrm.nn.adapt(dense(device), rank=2, name="first")
    first = tuned(model)
    lrm.nn.adapt(model, rank=2, name="second")
    return model, [first, tuned(model)]


def one_for_all_adapters(device):
    model = lrm.nn.adapt(dense(device), rank=2, name="first")
    lrm.nn.adapt(model, rank=2, name="second")
    updates = [p for name, p in model.named_parameters() if "update" in name]
    lrm.nn.set_adapter(model, "first")
    return model, [lrm.optim.CondLR(updates, lr=0.1)]


def from_a_copy(device):
    first = dense(device)
    model = lrm.factorize(copy.deepcopy(first), rank=4, exclude="2")
    first.twin = [model]
    return first, [torch.optim.SGD(first.parameters(), lr=0.1)]


@pytest.mark.parametrize(
    "make",
    [
        frozen,
        one_for_each_part,
        the_other_one_first,
        old_one_kept,
        adapters_beside,
        one_for_each_adapter,
        one_for_all_adapters,
        from_a_copy,
    ],
)
def test_programs_that_are_right_are_not_warned_of(make, device):
    model, optimizers = make(device)
    silent(lambda: [step(model, *optimizers) for _ in range(5)])


def test_an_optimizer_that_steps_more_rarely_counts_as_well(device):
    """As in adversarial training: one part moves five times as often as the other."""
    model, (rest, low_rank) = one_for_each_part(device)

    def train():
        for _ in range(2):
            for _ in range(5):
                step(model, rest)
            step(model, low_rank)

    silent(train)


def test_dense_layers_that_live_on_in_another_model_may_be_trained(device):
    """The same modules in two models: their weights still get gradients."""
    layers = [nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 5)]
    first = nn.Sequential(*layers).to(device)
    optimizer = torch.optim.SGD(first.parameters(), lr=0.1)
    second = lrm.factorize(nn.Sequential(*layers), rank=4, exclude="2")

    def train():
        for _ in range(4):
            for p in second.parameters():
                p.grad = None
            second(torch.randn(8, 20, device=device)).square().mean().backward()
            step(first, optimizer)

    silent(train)


def test_a_gradient_at_the_address_of_the_last_one_is_another_one(device):
    """Memory is used again: of many such trainings none is warned of."""
    for _ in range(20):
        test_dense_layers_that_live_on_in_another_model_may_be_trained(device)


def test_gradients_left_from_before_do_not_hide_it(device):
    model = dense(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step(model, optimizer)  # leaves gradients in the old weights, which nobody clears any more
    model = lrm.factorize(model, rank=4, exclude="2")

    def train():
        model.zero_grad()
        model(torch.randn(8, 20, device=device)).square().mean().backward()
        optimizer.step()

    silent(train)
    with pytest.warns(UserWarning, match="they do not move"):
        train()


def test_weights_that_somebody_moves_by_hand_are_not_warned_of(device):
    model = dense(device)
    rest = torch.optim.SGD(model.parameters(), lr=0.1)
    model = lrm.factorize(model, rank=4, exclude="2")
    weight = model[0].weight

    def train():
        for _ in range(4):
            step(model, rest)
            with torch.no_grad():
                M = weight.manifold
                weight.copy_(M.retr(weight, -0.01 * M.egrad2rgrad(weight, weight.grad)))

    silent(train)


def test_neither_old_nor_new_weights_are_kept_alive(device):
    model = dense(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    old = TensorWeakRef(model[0].weight)
    model = lrm.factorize(model, rank=4, exclude="2")
    new = TensorWeakRef(model[0].weight)
    del model
    gc.collect()
    assert old() is not None  # the optimizer's own
    assert new() is None
    del optimizer
    gc.collect()
    assert old() is None


def test_so_is_one_built_before_two_conversions_that_changed_the_rank(device):
    model = lrm.factorize(dense(device), rank=4, exclude="2")
    optimizer = lrm.optim.CondLR(model.parameters(), lr=0.1)
    step(model, optimizer)
    model = lrm.factorize(lrm.densify(model), rank=6, exclude="2")
    silent(lambda: step(model, optimizer))
    with pytest.warns(UserWarning, match=r"CondLR was built before factorize.*: 1 of its"):
        step(model, optimizer)
