"""lightning: CondLR from configure_optimizers, checkpoints by its own means."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lrmanifold as lrm

lightning = pytest.importorskip("lightning")


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = lrm.factorize(
            nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3)), rank=3, exclude="2"
        )

    def training_step(self, batch, index):
        x, y = batch
        return nn.functional.cross_entropy(self.network(x), y)

    def configure_optimizers(self):
        return lrm.optim.CondLR(self.parameters(), lr=0.1, momentum=0.5)


def fit(folder, epochs, precision="32-true", resume=None):
    torch.manual_seed(0)
    module = Module()
    x = torch.randn(64, 12)
    loader = DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=16)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        precision=precision,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
    )
    trainer.fit(module, loader, ckpt_path=resume)
    return module, trainer


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "64-true"])
def test_training_and_resuming(tmp_path, precision):
    whole, trainer = fit(tmp_path / "a", 4, precision)
    assert trainer.global_step == 16
    layer = whole.network[0]
    assert layer.weight.manifold is layer.manifold
    assert float(layer.manifold.drift(layer.weight.detach())) <= 1e-6
    assert layer.manifold.cond(layer.weight.detach()) <= 1.1 + 1e-5
    _, first = fit(tmp_path / "b", 2, precision)
    first.save_checkpoint(tmp_path / "half.ckpt")
    other, _ = fit(tmp_path / "c", 4, precision, resume=tmp_path / "half.ckpt")
    for a, b in zip(whole.parameters(), other.parameters(), strict=True):
        if precision == "64-true":  # lightning restores float64 through float32, plain SGD's too
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(a, b)
