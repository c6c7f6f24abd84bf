"""accelerate: prepared, trained, saved and restored."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lrmanifold as lrm

accelerate = pytest.importorskip("accelerate")


def parts():
    torch.manual_seed(0)
    model = lrm.factorize(
        nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3)), rank=3, exclude="2"
    )
    optimizer = lrm.optim.CondLR(model.parameters(), lr=0.1, momentum=0.5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    x = torch.randn(64, 12)
    loader = DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=16)
    return model, optimizer, loader, schedule


def train(accelerator, model, optimizer, loader, schedule, epochs):
    for _ in range(epochs):
        for x, y in loader:
            with accelerator.accumulate(model):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(x), y)
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_training_saving_and_restoring(tmp_path, precision):
    def prepared():
        accelerate.state.AcceleratorState._reset_state()
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
        return accelerator, accelerator.prepare(*parts())

    accelerator, (model, *others) = prepared()
    train(accelerator, model, *others, epochs=2)
    accelerator.save_state(str(tmp_path))
    train(accelerator, model, *others, epochs=2)
    layer = accelerator.unwrap_model(model)[0]
    assert layer.weight.manifold is layer.manifold
    assert float(layer.manifold.drift(layer.weight.detach())) <= 1e-6
    assert layer.manifold.cond(layer.weight.detach()) <= 1.1 + 1e-5

    again, (other, *rest) = prepared()
    again.load_state(str(tmp_path))
    train(again, other, *rest, epochs=2)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
