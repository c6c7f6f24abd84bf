"""The public functions with good arguments, and what kind each argument is, for the fuzz."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import lrmanifold as lrm
from lrmanifold import testing
from lrmanifold.experiments.training import Settings
from lrmanifold.nn import (
    LowRankAdapter,
    LowRankConv1d,
    LowRankConv2d,
    LowRankConvTranspose2d,
    LowRankEmbedding,
    LowRankLinear,
    LowRankMultiheadAttention,
)

FOUND = {"version": 1, "layers": {}}

NAN = float("nan")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(20, 18), nn.Linear(18, 3)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x.flatten(1))))


def packed(manifold: Any) -> Any:
    from lrmanifold.interop.pymanopt import PackedFixedRank

    return PackedFixedRank(manifold)


def scheduled(**options: Any) -> Any:
    model = low()
    good = {"model": model, "optimizer": lrm.optim.CondLR(model.parameters(), lr=0.1)}
    return lrm.optim.RankScheduler(**{**good, **options})


def low() -> nn.Module:
    return lrm.factorize(Net(), rank=2)


def functions() -> dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, Any]]]:
    """Name to (function, good arguments, kinds of the arguments to be tried)."""
    x, y = torch.rand(4, 20), torch.zeros(4, dtype=torch.long)
    M = lrm.FixedRank(6, 5, 2)
    W, S = torch.randn(6, 5), torch.eye(3) + 0.1 * torch.ones(3, 3)

    def tau(**more: Any) -> tuple:
        return "number", {"optional": True, "bad": (-1.0,), **more}

    rank = ("integer", {"bad": (0, -1, 99)})
    size = ("integer", {"bad": (0, -1)})
    share = ("number", {"optional": True, "bad": (0.0, -1.0, 2.0)})
    optional_name = ("name", {"optional": True})
    # "rank" of factorize: a float is a share, so that only these are wrong
    ranks = (
        "number",
        {"optional": True, "bad": (0, -1, 0.0, 1.5, {"*": "3"}, {"*": True}, {3: 2})},
    )
    layer = {"rank": rank, "tau": tau(), "gradient": "name", "retraction": optional_name,
             "device": "device", "dtype": ("dtype", {"optional": True})}  # fmt: skip
    sizes = ("integer", {"bad": (0, -1, (1, 2, 3), (1, "x"))})
    worst = {
        "model": "function",
        "eps": ("number", {"bad": (-1.0,)}),
        "norm": "name",
        "attacks": ("patterns", {"bad": (["zzz"],)}),
        "steps": size,
        "restarts": size,
        "queries": size,
        "individually": "flag",
        "batch_size": size,
        "device": "device",
        "data": "tensor",
    }
    attack = {"model": "function", "x": "tensor", "y": "tensor", "eps": ("number", {"bad": (-1,)}),
              "norm": "name", "loss": "function",
              "clip": ("number", {"optional": True, "bad": ((1.0, 0.0), (0, 1, 2), (0, "1"))}),
              }  # fmt: skip
    group = {"lr": ("number", {"bad": (-1.0, torch.tensor(-1.0))}),
             "weight_decay": ("number", {"bad": (-1.0,)}),
             "penalty": ("number", {"bad": (-1.0,)})}  # fmt: skip
    rate = {"lr": 0.1}
    return {
        "factorize": (
            lambda **k: lrm.factorize(**{"model": Net(), **k}), {"rank": 2},
            {"model": "module", "rank": ranks, "tau": tau(),
             "include": ("patterns", {"bad": ("z",)}), "exclude": ("patterns", {"bad": ("z", "")}),
             "init": "name", "gradient": "name",
             "retraction": optional_name, "keep_larger": "flag", "rank_multiple": size,
             "summary": ("function", {"optional": True})},
        ),
        "factorize by share": (lambda **k: lrm.factorize(Net(), **k), {},
                               {"compression": share, "energy": share}),
        "densify": (lrm.densify, {}, {"model": "module"}),
        "fold": (lrm.fold, {}, {"model": "module"}),
        "report": (lrm.report, {"model": nn.Linear(3, 2)}, {"model": "module", "wide": "flag"}),
        "trained_state_dict": (lrm.nn.trained_state_dict, {}, {"model": "module"}),
        "param_groups": (
            lrm.optim.param_groups, {"model": low()},
            {"model": "module", "lr": ("number", {"optional": True, "bad": (-1.0,)}),
             "weight_decay": ("number", {"optional": True, "bad": (-1.0,)})},
        ),
        "LowRankLinear": (
            LowRankLinear, {"in_features": 6, "out_features": 5, "rank": 2},
            {"in_features": size, "out_features": size, "bias": "flag", **layer},
        ),
        "LowRankConv2d": (
            LowRankConv2d, {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "rank": 2},
            {"in_channels": size, "out_channels": size, "kernel_size": sizes, "stride": sizes,
             "padding": ("integer", {"bad": (-1, (1, 2, 3), "full")}), "dilation": sizes,
             "groups": size, "bias": "flag", "padding_mode": "name", **layer},
        ),
        "LowRankConv1d": (
            LowRankConv1d, {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "rank": 2},
            {"kernel_size": sizes, "stride": sizes},
        ),
        "LowRankConvTranspose2d": (
            LowRankConvTranspose2d,
            {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "rank": 2},
            {"in_channels": size, "out_channels": size, "kernel_size": sizes, "stride": sizes,
             "padding": ("integer", {"bad": (-1, (1, 2, 3))}), "dilation": sizes,
             "groups": size, "bias": "flag", **layer},
        ),
        "LowRankEmbedding": (
            LowRankEmbedding, {"num_embeddings": 6, "embedding_dim": 5, "rank": 2},
            {"num_embeddings": size, "embedding_dim": size,
             "padding_idx": ("integer", {"optional": True, "bad": (6, -7)}), **layer},
        ),
        "LowRankMultiheadAttention": (
            LowRankMultiheadAttention, {"embed_dim": 6, "num_heads": 2, "rank": 2},
            {"embed_dim": size, "num_heads": size, "rank": size, "bias": "flag",
             "add_bias_kv": "flag", "add_zero_attn": "flag", "batch_first": "flag",
             "dropout": ("number", {"bad": (-1.0, 2.0)}), "tau": tau()},
        ),
        "LowRankMultiheadAttention.from_dense": (
            LowRankMultiheadAttention.from_dense,
            {"module": nn.MultiheadAttention(6, 2), "rank": 2},
            {"module": "module", "init": "name", "tau": tau()},
        ),
        "LowRankEmbedding.from_dense": (
            LowRankEmbedding.from_dense, {"module": nn.Embedding(6, 5), "rank": 2},
            {"module": "module", "init": "name", "rank": rank, "tau": tau()},
        ),
        "structure": (lrm.nn.structure, {}, {"model": "module"}),
        "restructure": (
            lrm.nn.restructure, {"model": nn.Linear(6, 5), "found": FOUND},
            {"model": "module"},
        ),
        "LowRankLinear.from_dense": (
            LowRankLinear.from_dense, {"module": nn.Linear(6, 5), "rank": 2},
            {"module": "module", "init": "name", "rank": rank, "tau": tau()},
        ),
        "LowRankConv2d.from_dense": (
            LowRankConv2d.from_dense, {"module": nn.Conv2d(4, 4, 3), "rank": 2},
            {"module": "module", "init": "name", "rank": rank, "tau": tau()},
        ),
        "LowRankAdapter": (
            LowRankAdapter, {"dense": nn.Linear(6, 5), "rank": 2},
            {"dense": "module", "rank": rank, "init": "name", "tau": tau(),
             "dtype": ("dtype", {"optional": True})},
        ),
        "FixedRank": (
            lrm.FixedRank, {"m": 6, "n": 5, "rank": 2},
            {"m": size, "n": size, "rank": rank, "retraction": "name", "gradient": "name"},
        ),
        "WellConditioned": (
            lrm.WellConditioned, {"m": 6, "n": 5, "rank": 2, "tau": 0.1},
            {"m": size, "rank": rank, "retraction": "name", "gradient": "name",
             "tau": ("number", {"bad": (-1.0,)}), "centre": "name"},
        ),
        "Stiefel": (lrm.Stiefel, {}, {"retraction": "name"}),
        "FixedRank.from_dense": (M.from_dense, {}, {"W": "tensor"}),
        "FixedRank.from_dense, matrices": (M.from_dense, {}, {"W": "matrix"}),
        "FixedRank.set_rank_": (M.set_rank_, {}, {"rank": rank}),
        "FixedRank.to_dense": (M.to_dense, {}, {"X": "tensor"}),
        "FixedRank.project_ambient": (
            M.project_ambient, {"X": M.random(), "Z": W}, {"X": "tensor", "Z": "tensor"},
        ),
        "retractions.get": (lrm.retractions.get, {}, {"retraction": "name"}),
        "retractions.register": (
            lambda name, overwrite: lrm.retractions.register(name, overwrite=overwrite),
            {"name": "mine", "overwrite": True},
            {"name": ("patterns", {}), "overwrite": "flag"},
        ),
        "monitor": (
            lrm.monitor, {"model": low()},
            {"model": "module", "every": size, "optimizer": "optimizer"},
        ),
        "monitor with a reference": (
            lrm.monitor, {"model": low(), "reference": Net(), "loss": lambda m: m(x).sum(),
                          "optimizer": lrm.optim.CondLR(low().parameters(), **rate)},
            {"reference": "module", "loss": "function"},
        ),
        "fgsm": (lrm.robustness.fgsm, {"model": Net(), "x": x, "y": y, "eps": 0.1}, attack),
        "pgd": (
            lrm.robustness.pgd, {"model": Net(), "x": x, "y": y, "eps": 0.1, "steps": 2},
            {**attack, "steps": size, "random_start": "flag",
             "restarts": ("integer", {"bad": (0, -1), "optional": True}),
             "step_size": ("number", {"optional": True, "bad": (-1.0,)}),
             "generator": ("optimizer", {})},
        ),
        "worst_case": (
            lrm.robustness.worst_case,
            {"model": Net(), "data": (x, y), "eps": 0.1, "attacks": ("pgd",), "steps": 2}, worst,
        ),
        "check_masking": (
            lrm.robustness.check_masking,
            # Labels that the network finds, or there is nothing to attack.
            {"model": (net := Net()), "data": (x, net(x).argmax(-1)), "eps": 0.1, "steps": 2,
             "queries": 1000},
            {"model": "function", "eps": ("number", {"bad": (-1.0, 0.0)}), "norm": "name",
             "steps": size, "tolerance": ("number", {"bad": (-1.0,)}),
             "batch_size": size, "device": "device"},
        ),
        "accuracy_under_attack": (
            lrm.robustness.accuracy_under_attack,
            {"model": Net(), "data": (x, y), "attack": lrm.robustness.fgsm, "strengths": [0.1]},
            {"model": "function", "attack": "function", "batch_size": size, "device": "device",
             "strengths": ("number", {"bad": ([NAN], [-1.0], ["x"])}), "data": "tensor"},
        ),
        "robustness.condition_number": (
            lrm.robustness.condition_number, {"f": Net(), "x": x},
            {"f": "function", "x": "tensor", "batched": "flag", "iters": size,
             "tol": ("number", {"optional": True, "bad": (-1.0,)})},
        ),
        "check_manifold": (
            testing.check_manifold, {"manifold": M, "trials": 1, "checks": ["retr"]},
            {"manifold": ("module", {"bad": (nn.Linear(2, 2),)}), "dtype": "dtype",
             "device": ("device", {"bad": (None,)}),
             "seed": ("integer", {}), "trials": size, "checks": ("patterns", {"bad": (["zzz"],)}),
             "skip": ("patterns", {"bad": (["zzz"],)}),
             "tol": ("number", {"optional": True, "bad": (-1.0,)})},
        ),
        "check_retraction": (
            testing.check_retraction, {"manifold": M, "order": 2},
            {"manifold": ("module", {"bad": (nn.Linear(2, 2),)}), "order": size, "dtype": "dtype"},
        ),
        "Settings": (
            Settings, {},
            {"epochs": size, "batch_size": size, "seed": ("integer", {"bad": (2**70,)}),
             "lr": ("number", {"bad": (-1.0, 0.0)}), "momentum": ("number", {"bad": (-1, 1, 2)})},
        ),
        "checkpoint.save": (
            lrm.checkpoint.save, {"path": Path(tempfile.gettempdir()) / "fuzz.pt", "model": low()},
            {"path": "path", "model": "module", "optimizer": "optimizer"},
        ),
        "checkpoint.load": (
            lrm.checkpoint.load, {"path": "missing.pt", "model": low()},
            {"path": "path", "model": "module", "optimizer": "optimizer"},
        ),
        "lipschitz": (
            lrm.certify.lipschitz, {"model": low(), "input_shape": (20,)},
            {"model": "module", "norm": "name",
             "input_shape": ("patterns", {"bad": ((0,), (-1,), (2.0,), ("a",), 5, "x")})},
        ),
        "radius": (
            lrm.certify.radius, {"model": low(), "x": x},
            {"model": "module", "x": "tensor", "bound": ("optimizer", {})},
        ),
        "verified_accuracy": (
            lrm.certify.verified_accuracy, {"model": low(), "data": (x, y), "eps": 0.1},
            {"model": "module", "data": "tensor", "batch_size": size,
             "eps": ("number", {"bad": (-1.0,)}),
             "attack": ("function", {"optional": True}),
             "progress": ("function", {"optional": True})},
        ),
        "worst_case_logits": (
            lrm.certify.worst_case_logits,
            {"model_or_bound": low(), "logits": torch.randn(4, 3), "y": y, "eps": 0.1},
            {"model_or_bound": "module", "logits": "tensor", "y": "tensor",
             "eps": ("number", {"bad": (-1.0,)})},
        ),
        "CertifiedLoss": (
            lrm.certify.CertifiedLoss, {"eps": 0.1},
            {"eps": ("number", {"bad": (-1.0,)}), "kind": "name",
             "weight": ("number", {"bad": (-1.0,)}), "temperature": ("number", {"bad": (-1.0,)}),
             "schedule": ("function", {"optional": True, "bad": (0, -1)})},
        ),
        "register_bound": (
            lrm.certify.register_bound, {"module_type": Net, "function": len},
            {"function": "function", "module_type": ("optimizer", {"bad": (None,)})},
        ),
        "MaxMin": (lrm.nn.MaxMin, {}, {"dim": ("integer", {"bad": (0,)})}),
        "MeanOnlyBatchNorm": (
            lrm.nn.MeanOnlyBatchNorm, {"num_features": 3},
            {"num_features": size, "momentum": ("number", {"bad": (0.0, -0.1, 2.0)}),
             "bias": "flag", "dtype": "dtype", "device": "device"},
        ),
        "Patchify": (lrm.nn.Patchify, {"size": 2}, {"size": size}),
        "Residual": (lambda blocks: lrm.nn.Residual(blocks), {}, {"blocks": "module"}),
        "ConvexPotential": (
            lrm.nn.ConvexPotential, {"features": 6, "rank": 2},
            {"features": size, "rank": rank, "tau": tau(),
             "hidden": ("integer", {"optional": True, "bad": (0, -1)}),
             "activation": ("function", {"optional": True})},
        ),
        "PackedFixedRank": (packed, {}, {"manifold": "module"}),
        "spectra": (
            lrm.viz.spectra, {"history": {"a": np.ones((3, 2))}},
            {"history": "module", "columns": size,
             "tau": ("number", {"optional": True, "bad": (-1.0,)})},
        ),
        "accuracy_curves": (
            lrm.viz.accuracy_curves, {"results": {"a": {0.0: 0.9, 0.1: 0.8}}},
            {"results": "module", "legend": "flag", "relative_to": optional_name},
        ),
        "svdvals": (lrm.linalg.svdvals, {}, {"A": "tensor"}),
        "spectral_clip": (
            lrm.linalg.spectral_clip, {"S": S, "tau": 0.1},
            {"S": "tensor", "tau": ("number", {"bad": (-1.0,)}), "centre": "name"},
        ),
        "CondLR": (
            lambda **k: lrm.optim.CondLR(low().parameters(), **k), {**rate, "momentum": 0.5},
            {**group, "momentum": ("number", {"bad": (-1.0, 1.0)}), "nesterov": "flag",
             "metric": "name", "maximize": "flag", "skip_nonfinite": "flag",
             "clip_margin": ("number", {"bad": (-1.0,)})},
        ),
        "CondLRAdam": (
            lambda **k: lrm.optim.CondLRAdam(low().parameters(), **k), rate,
            {**group, "eps": ("number", {"bad": (-1.0,)}), "maximize": "flag",
             "betas": ("number", {"bad": ((0.9,), (0.9, 1.0), (-1, 0.5), ("a", 0.5))})},
        ),
        "CondLRMuon": (
            lambda **k: lrm.optim.CondLRMuon(low().parameters(), **k), rate,
            {**group, "eps": ("number", {"bad": (-1.0,)}), "maximize": "flag", "nesterov": "flag",
             "momentum": ("number", {"bad": (-1.0, 1.0)}),
             "betas": ("number", {"bad": ((0.9,), (0.9, 1.0), (-1, 0.5), ("a", 0.5))})},
        ),
        "DLRT": (
            lambda **k: lrm.optim.DLRT(low().parameters(), **k), {**rate, "tol": 0.1},
            {**group, "integrator": "name", "s_steps": size, "min_rank": size,
             "tol": ("number", {"optional": True, "bad": (-1.0, 1.0)}),
             "max_rank": ("integer", {"optional": True, "bad": (0, -1)}),
             "penalty_squared": "flag", "maximize": "flag", "skip_nonfinite": "flag"},
        ),
        "RankScheduler": (
            scheduled, {"tol": 0.1},
            {"model": "module", "optimizer": ("optimizer", {"bad": (None,)}), "every": size,
             "tol": ("number", {"bad": (-1.0,)}),
             "min_rank": ("integer", {"optional": True, "bad": (0, -1)}),
             "max_rank": ("integer", {"optional": True, "bad": (0, -1)}),
             "augment": ("integer", {"optional": True, "bad": (-1,)})},
        ),
        "OptionScheduler": (
            lrm.optim.OptionScheduler,
            {"optimizer": lrm.optim.CondLR(low().parameters(), **rate), "option": "penalty",
             "function": float},
            {"optimizer": ("optimizer", {"bad": (None,)}), "option": "name",
             "function": "function"},
        ),
        "average_points": (
            lrm.optim.average_points,
            {"manifold": M, "X": M.random(), "Y": M.random(), "weight": 0.5},
            {"X": "tensor", "Y": "tensor", "weight": ("number", {"bad": (-1.0, 2.0)}),
             "manifold": "module"},
        ),
        "retracting_average": (
            lrm.optim.retracting_average, {"model": low()},
            {"model": "module", "decay": ("number", {"optional": True, "bad": (-1.0, 1.0)}),
             "use_buffers": "flag"},
        ),
    }  # fmt: skip
