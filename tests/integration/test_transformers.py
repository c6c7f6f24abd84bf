"""transformers: its Trainer drives CondLR, its models go through factorize and densify."""

from __future__ import annotations

import copy

import pytest
import torch

import lrmanifold as lrm

transformers = pytest.importorskip("transformers")


def bert():
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
        num_labels=2,
    )
    return transformers.BertForSequenceClassification(config)


def resnet18():
    """Its 18 layers, with an eighth of the width."""
    config = transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 32, 64],
        depths=[2, 2, 2, 2],
        layer_type="basic",
        num_labels=3,
    )
    return transformers.ResNetForImageClassification(config)


def vit():
    config = transformers.ViTConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=96,
        image_size=32,
        patch_size=8,
        num_labels=3,
    )
    return transformers.ViTForImageClassification(config)


def convnext():
    config = transformers.ConvNextConfig(
        hidden_sizes=[16, 24, 32, 48], depths=[1, 1, 2, 1], num_labels=3, image_size=32
    )
    return transformers.ConvNextForImageClassification(config)


def layers(model):
    return [m for m in model.modules() if isinstance(m, lrm.nn.LowRankLayer)]


def assert_on_manifold(model) -> None:
    assert layers(model)
    for layer in layers(model):
        assert layer.weight.manifold is layer.manifold
        X = layer.weight.detach()
        assert float(layer.manifold.drift(X).max()) <= 1e-5
        assert float(layer.manifold.cond(X).max()) <= 1.1 + 1e-4


def sentences(count: int = 64) -> list[dict]:
    """The label is whether the first word is in the second half of the vocabulary."""
    generator = torch.Generator().manual_seed(2)
    words = torch.randint(50, (count, 8), generator=generator)
    return [{"input_ids": row, "labels": int(row[0] >= 25)} for row in words]


def trainer(model, folder, steps=12, **options):
    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=16,
        save_steps=6,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_steps=1000,
        seed=3,
        **options,
    )
    groups = lrm.optim.param_groups(model, weight_decay=1e-3)
    optimizer = lrm.optim.CondLR(groups, lr=0.05, momentum=0.5)
    return transformers.Trainer(
        model=model, args=arguments, train_dataset=sentences(), optimizers=(optimizer, None)
    )


def test_its_trainer_trains_saves_and_resumes(tmp_path):
    torch.manual_seed(0)
    start = lrm.factorize(bert(), rank=4, exclude="classifier")
    model = copy.deepcopy(start)
    whole = trainer(model, tmp_path / "run")
    whole.train()
    assert whole.state.global_step == 12
    assert_on_manifold(model)
    assert not torch.equal(layers(model)[0].weight, layers(start)[0].weight)

    other = copy.deepcopy(start)
    trainer(other, tmp_path / "again").train(
        resume_from_checkpoint=str(tmp_path / "run/checkpoint-6")
    )
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert_on_manifold(other)

    whole.save_model(str(tmp_path / "saved"))
    pytest.importorskip("safetensors")
    third = copy.deepcopy(start)
    lrm.checkpoint.load(tmp_path / "saved" / "model.safetensors", third)
    words = {"input_ids": torch.arange(8)[None]}
    for each in (third, model):
        each.eval()
    assert torch.equal(third(**words).logits, model(**words).logits)


def test_its_trainer_clips_accumulates_and_casts(tmp_path):
    model = lrm.factorize(bert(), rank=4, exclude="classifier")
    options = {"max_grad_norm": 0.1, "gradient_accumulation_steps": 2, "bf16": True}
    trainer(model, tmp_path, 4, **options).train()
    assert_on_manifold(model)


@pytest.mark.parametrize("build", [bert, resnet18, vit, convnext])
def test_its_models_through_factorize_training_and_densify(build):
    torch.manual_seed(0)
    model = build()
    classes = {type(m) for m in model.modules()}
    lrm.factorize(model, rank=0.25, tau=0.1)
    optimizer = lrm.optim.CondLR(model.parameters(), lr=0.05, momentum=0.5)
    count = 8
    labels = torch.randint(2, (count,))
    if build is bert:
        batch = {"input_ids": torch.randint(50, (count, 8))}
    else:
        batch = {"pixel_values": torch.randn(count, 3, 32, 32)}
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert min(losses[-3:]) < losses[0]
    assert_on_manifold(model)
    model.eval()
    with torch.no_grad():
        expected = model(**batch).logits
        lrm.densify(model)
        assert not layers(model)
        torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-5)
    assert {type(m) for m in model.modules()} == classes


def test_adapters_on_layers_with_transposed_weights(device):
    """GPT-2's layers are Conv1D, (in_features, out_features)."""
    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=24, n_layer=2, n_head=2)
    model = transformers.GPT2LMHeadModel(config).to(device).eval()
    words = torch.randint(50, (4, 8), device=device)
    before = model(words).logits
    lrm.nn.adapt(model, 3, alpha=6)
    assert torch.equal(model(words).logits, before)
    adapted = [m for m in model.modules() if isinstance(m, lrm.nn.AdaptedLayer)]
    assert len(adapted) == 8
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = lrm.optim.CondLRAdam(trained, lr=0.01)
    losses = []
    for _ in range(6):
        loss = model(words, labels=words).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    after = model(words).logits
    layer = adapted[1]
    assert layer.weight.shape == layer.base_layer.weight.shape
    lrm.nn.merge(model)
    torch.testing.assert_close(model(words).logits, after, rtol=1e-4, atol=1e-5)
    lrm.nn.unmerge(model)
    assert torch.equal(model(words).logits, after)
