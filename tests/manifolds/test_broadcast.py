"""One point and a batch of vectors, a batch of points and one vector: batches are broadcast."""

from __future__ import annotations

import pytest
import torch

import lrmanifold as lrm
from lrmanifold.testing import random_tangent

LOW_RANK = {name: lrm.FixedRank(6, 5, 2, retraction=name) for name in lrm.retractions.available()}
FRAMES = {name: lrm.Stiefel(name) for name in ("polar", "qr", "cayley")}
MANIFOLDS = LOW_RANK | FRAMES


def calls(M, x, u, y, *, geodesics):
    """Results of methods that take points `x` and `y` and vectors `u` at `x`."""
    out = {
        "retr": M.retr(x, 0.1 * u),
        "retr_transp": torch.cat(M.retr_transp(x, 0.1 * u, u), -2),
        "transp": M.transp(x, y, u),
        "proju": M.proju(x, u),
        "egrad2rgrad": M.egrad2rgrad(x, u),
        "inner": M.inner(x, u),
    }
    if geodesics:
        out["expmap"] = M.expmap(x, 0.1 * u)
    if isinstance(M, lrm.FixedRank):
        out |= {"dist": M.dist(x, y), "inverse_retr": M.inverse_retr(x, y)}
        out |= {"lift": M.lift(x, u), "dense": M.tangent_to_dense(x, u)}
    return out


@pytest.mark.parametrize("many", ["vectors", "points", "both"])
@pytest.mark.parametrize("name", MANIFOLDS)
def test_batches_of_points_and_of_vectors_are_broadcast(name, many, device):
    M = MANIFOLDS[name]
    size = getattr(M, "point_shape", (6, 2))
    options = {"dtype": torch.float64, "device": device}
    point = torch.Tensor(M.random(*size, **options))
    other = torch.Tensor(M.random(*size, **options))
    vectors = [random_tangent(M, point) for _ in range(2)]
    x, u = {
        "vectors": (point, torch.stack(vectors)),
        "points": (torch.stack((point, point)), vectors[0]),
        "both": (torch.stack((point, point, point))[:, None], torch.stack(vectors)),
    }[many]
    # those of low rank take long: one way, and where both are batches
    geodesics = not isinstance(M, lrm.FixedRank) or (M.retraction == "svd" and many == "both")
    alone = vectors[:1] if many == "points" else vectors
    singles = [calls(M, point, v, other, geodesics=geodesics) for v in alone]
    for key, value in calls(M, x, u, other, geodesics=geodesics).items():
        each = torch.stack([single[key] for single in singles])
        torch.testing.assert_close(*torch.broadcast_tensors(value, each), rtol=1e-9, atol=1e-10)
        if key not in ("dist", "inverse_retr", "inner", "transp"):
            lead = torch.broadcast_shapes(x.shape[:-2], u.shape[:-2])
            assert value.shape == (*lead, *singles[0][key].shape), key
