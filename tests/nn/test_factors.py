"""layer.U, layer.S, layer.V: the factors by the names that the literature gives them."""

from __future__ import annotations

import pytest
import torch
from layer_cases import LAYERS


@pytest.mark.parametrize("name", list(LAYERS))
def test_factors_are_views_with_gradients_that_make_the_weight(name):
    layer = LAYERS[name]()
    U, S, V = layer.U, layer.S, layer.V
    assert all(torch.equal(a, b) for a, b in zip((U, S, V), layer.factors, strict=True))
    torch.testing.assert_close(layer.as_weight(U @ S @ V.mT), layer.dense_weight())
    eye = torch.eye(layer.rank).expand_as(S)
    torch.testing.assert_close(U.mT @ U, eye, atol=1e-6, rtol=0)
    torch.testing.assert_close(V.mT @ V, eye, atol=1e-6, rtol=0)
    (U.sum() + 2 * S.sum() + 3 * V.sum()).backward()
    M = layer.manifold
    rows = torch.tensor([1.0] * M.m + [2.0] * M.rank + [3.0] * M.n)
    assert torch.equal(layer.weight.grad, rows[:, None].expand_as(layer.weight))


@pytest.mark.parametrize("name", list(LAYERS))
def test_writing_into_a_view_writes_into_the_weight(name):
    layer = LAYERS[name]()
    before = layer.dense_weight().detach()
    with torch.no_grad():
        layer.S.mul_(2.0)
    torch.testing.assert_close(layer.dense_weight().detach(), 2.0 * before)


@pytest.mark.parametrize("factor", ["U", "S", "V"])
def test_a_factor_is_no_attribute_to_be_replaced(factor):
    layer = LAYERS["linear"]()
    with pytest.raises(AttributeError):
        setattr(layer, factor, torch.zeros_like(getattr(layer, factor)))
