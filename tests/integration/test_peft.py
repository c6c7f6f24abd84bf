"""PEFT: well-conditioned adapters as one of its methods, on small models of transformers."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
from torch import nn

import lrmanifold as lrm

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from lrmanifold.interop.peft import LowRankConfig, LowRankTunerLayer  # noqa: E402


def llama(device):
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    return transformers.LlamaForCausalLM(config).to(device)


def bert(device):
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertForSequenceClassification(config).to(device)


def gpt2(device):
    """Its layers are transformers' Conv1D, whose weights are transposed."""
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=32, n_embd=32, n_layer=2, n_head=2, attn_pdrop=0.0
    )
    config.embd_pdrop = config.resid_pdrop = 0.0
    return transformers.GPT2LMHeadModel(config).to(device)


def words(device):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(50, (4, 8), generator=generator).to(device)


def loss_of(model, x):
    is_bert = "Bert" in type(getattr(model, "base_model", model).model).__name__
    return model(x, labels=x[:, 0] % 2 if is_bert else x).loss


def train(model, x, steps=6) -> list[float]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = lrm.optim.CondLRAdam(trained, lr=0.02)
    losses = []
    for _ in range(steps):
        loss = loss_of(model, x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def changes(model) -> list:
    return [m for m in model.modules() if isinstance(m, lrm.nn.Change)]


def tuner_layers(model) -> list:
    return [m for m in model.modules() if isinstance(m, LowRankTunerLayer)]


@pytest.mark.parametrize("build", [llama, bert, gpt2])
@pytest.mark.parametrize("alpha", [None, 6.0])
def test_a_model_from_start_to_merged(build, alpha, device, tmp_path):
    base = build(device)
    frozen, x = copy.deepcopy(base).eval(), words(device)
    before = frozen(x).logits
    kinds = [type(m) for m in frozen.modules()]
    model = peft.get_peft_model(base.eval(), LowRankConfig(r=3, alpha=alpha))
    assert torch.equal(model(x).logits, before)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(n.endswith("lrmanifold_changes.default.update.weight") for n in trained)
    losses = train(model, x)
    assert losses[-1] < losses[0]
    for change in changes(model):
        point = change.update.weight.detach()
        assert float(change.update.manifold.cond(point)) <= 1.1 + 1e-4
    after = model(x).logits
    assert not torch.allclose(after, before)
    with model.disable_adapter():
        assert torch.equal(model(x).logits, before)

    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LRMANIFOLD"
    for lean in (False, True):
        loaded = peft.PeftModel.from_pretrained(
            copy.deepcopy(frozen), tmp_path, low_cpu_mem_usage=lean, is_trainable=True
        )
        assert torch.equal(loaded.eval()(x).logits, after)
        assert train(loaded, x, 2)[0] == pytest.approx(float(loss_of(model, x).detach()), rel=1e-5)
        assert all(lrm.parameter.manifold_of(c.update.weight) is not None for c in changes(loaded))

    small = lrm.nn.trained_state_dict(model)
    assert {key.rsplit("default.", 1)[1] for key in small} == {
        "start",
        "update.weight",
        "_extra_state",
    }
    merged = copy.deepcopy(model).merge_and_unload()
    assert [type(m) for m in merged.modules()] == kinds
    torch.testing.assert_close(merged(x).logits, after, rtol=1e-4, atol=1e-5)
    assert torch.equal(model.unload()(x).logits, before)


def test_several_adapters_are_switched_summed_merged_saved_and_deleted(device, tmp_path):
    frozen, x = llama(device).eval(), words(device)
    base = frozen(x).logits
    model = peft.get_peft_model(
        copy.deepcopy(frozen), LowRankConfig(r=2, target_modules=["q_proj"]), "a"
    )
    train(model, x)
    a = model(x).logits
    model.add_adapter("b", LowRankConfig(r=3, tau=None, target_modules=["q_proj", "down_proj"]))
    assert torch.equal(model(x).logits, a)  # "a" is active still
    model.set_adapter("b")
    assert torch.equal(model(x).logits, base)
    train(model, x)
    b = model(x).logits
    model.set_adapter("a")
    assert torch.equal(model(x).logits, a)

    model.base_model.set_adapter(["a", "b"])
    both = model(x).logits
    layer = tuner_layers(model)[0]
    total = layer.base_layer.weight + layer.get_delta_weight("a") + layer.get_delta_weight("b")
    weight = layer.base_layer.weight.clone()
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(layer.base_layer.weight, total)
    torch.testing.assert_close(model(x).logits, both, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(layer.base_layer.weight, weight)
    with pytest.warns(UserWarning, match="nothing to unmerge"):
        layer.unmerge()

    model.save_pretrained(tmp_path)
    for name, expected in (("a", a), ("b", b)):
        other = peft.PeftModel.from_pretrained(copy.deepcopy(frozen), tmp_path / name)
        torch.testing.assert_close(other.eval()(x).logits, expected, rtol=1e-4, atol=1e-5)
    model.set_adapter("b")
    model.delete_adapter("a")
    assert all("a" not in layer.lrmanifold_changes for layer in tuner_layers(model))
    torch.testing.assert_close(model(x).logits, b, rtol=1e-4, atol=1e-5)


def test_beside_layers_of_16_bits_adapters_have_32_and_stay_so_when_loaded(device, tmp_path):
    frozen, x = llama(device).to(torch.bfloat16).eval(), words(device)
    before = frozen(x).logits
    model = peft.get_peft_model(
        copy.deepcopy(frozen), LowRankConfig(r=2), autocast_adapter_dtype=False
    )
    assert {c.update.weight.dtype for c in changes(model)} == {torch.float32}
    assert torch.equal(model(x).logits, before)
    train(model, x)
    model.save_pretrained(tmp_path)
    for lean in (False, True):
        loaded = peft.PeftModel.from_pretrained(
            copy.deepcopy(frozen), tmp_path, low_cpu_mem_usage=lean
        )
        for mine, its in zip(changes(model), changes(loaded), strict=True):
            assert its.update.weight.dtype == its.start.dtype == torch.float32
            assert torch.equal(mine.update.weight, its.update.weight)
            assert torch.equal(mine.start, its.start)


def test_modules_to_save_and_patterns(device, tmp_path):
    frozen, x = bert(device).eval(), words(device)
    config = LowRankConfig(
        r=2,
        dropout=0.2,
        init="svd",
        target_modules="all-linear",
        exclude_modules=["pooler.dense"],
        modules_to_save=["classifier"],
    )
    model = peft.get_peft_model(copy.deepcopy(frozen), config)
    assert len(tuner_layers(model)) == 12
    assert any(
        "classifier.modules_to_save" in n for n, p in model.named_parameters() if p.requires_grad
    )
    model.train()
    assert not torch.equal(loss_of(model, x), 0 * x.sum())
    train(model, x)
    assert not torch.equal(model(x).logits, model(x).logits)  # dropout
    model.eval()
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(frozen), tmp_path).eval()
    assert torch.equal(loaded(x).logits, model(x).logits)
    assert loaded.peft_config["default"].to_dict() == {
        **config.to_dict(),
        "inference_mode": True,
        "auto_mapping": loaded.peft_config["default"].auto_mapping,
    }


def test_what_cannot_be_adapted_merged_or_saved_is_named(device, tmp_path):
    def adapted(model, *args, **options):
        return peft.get_peft_model(model, LowRankConfig(**options), *args)

    with pytest.raises(ValueError, match=r"must match linear layers, but .*embed_tokens' is a Emb"):
        adapted(llama(device), target_modules=["embed_tokens"])
    encoder = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, device=device))
    with pytest.raises(ValueError, match=r"must not match .*self_attn.out_proj"):
        adapted(encoder, target_modules=["out_proj"])
    with pytest.raises(ValueError, match=r"name must be none of .*, got 'update'"):
        adapted(llama(device), "update")
    with pytest.raises(ValueError, match=r"layer '.*q_proj' cannot be adapted: tau"):
        adapted(llama(device), tau=-1.0)
    with pytest.raises(ValueError, match="layers_to_transform must be None"):
        LowRankConfig(target_modules=".*q_proj", layers_to_transform=[0])
    with pytest.raises(ValueError, match="layers_to_transform must be given"):
        LowRankConfig(layers_pattern="layers")

    low = lrm.factorize(llama(device), rank=4, include="*.q_proj")
    x = words(device)
    model = adapted(low, target_modules=["q_proj"])
    train(model, x)
    with pytest.raises(ValueError, match=r"dense weight of 16 bits or more, got a LowRankLinear"):
        model.merge_and_unload()

    model = adapted(llama(device))
    trained = [p for p in model.parameters() if p.requires_grad]
    foreign = torch.optim.SGD([{"params": [p.data.requires_grad_() for p in trained]}], lr=1.0)
    for p in foreign.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    foreign.step()
    with pytest.raises(lrm.errors.GeometryError, match=r"update.weight cannot be saved.*optimizer"):
        model.save_pretrained(tmp_path)


def test_a_merge_that_is_not_finite_changes_nothing(device):
    model = peft.get_peft_model(llama(device), LowRankConfig(r=2))
    layer = tuner_layers(model)[0]
    layer.lrmanifold_changes["default"].start.fill_(float("inf"))
    weight = layer.base_layer.weight.clone()
    with pytest.raises(ValueError, match="must be finite"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, weight)
    assert not layer.merged


def test_a_layer_that_cannot_be_merged_is_found_before_any_is(device):
    base = lrm.factorize(llama(device).eval(), rank=8, include="*layers.1*q_proj")
    model = peft.get_peft_model(base, LowRankConfig(r=2, target_modules=["q_proj"]))
    x = words(device)
    train(model, x)
    expected = model(x).logits
    weight = tuner_layers(model)[0].base_layer.weight.clone()
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"layer '.*1.*q_proj' cannot be merged: .* dense w"):
            merge()
    assert not any(layer.merged for layer in tuner_layers(model))
    assert torch.equal(tuner_layers(model)[0].base_layer.weight, weight)
    assert torch.equal(model(x).logits, expected)

    model = peft.get_peft_model(llama(device), LowRankConfig(r=2, target_modules=["q_proj"]))
    first, last = tuner_layers(model)
    last.lrmanifold_changes["default"].start.fill_(float("inf"))
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"1.*q_proj' cannot be merged: .*must be finite"):
            merge(safe_merge=True)
    assert not first.merged
    model.add_adapter("b", LowRankConfig(r=2, target_modules=["lm_head"]))
    model.merge_adapter(["b"])  # what is not merged does not stand in the way
    assert sum(layer.merged for layer in tuner_layers(model)) == 1


class Doubled(nn.Linear):
    """Its output is not the product with its weight."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_a_base_with_a_forward_of_its_own_is_adapted_but_not_merged(device):
    net = nn.ModuleDict({"a": nn.Linear(8, 8), "b": Doubled(8, 8)}).to(device)
    net.forward = lambda x: net["b"](net["a"](x))
    model = peft.get_peft_model(net, LowRankConfig(r=2, target_modules=["a", "b"]))
    with torch.no_grad():
        for change in changes(model):
            X = change.update.weight
            X.copy_(change.update.manifold.random(*X.shape, device=device))
    x = torch.randn(3, 8, device=device)
    expected = model(x)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"'b' cannot be merged: .*of its own \(Doubled\)"):
            merge()
    with pytest.raises(ValueError, match="forward of its own"):
        tuner_layers(model)[1].merge()
    assert torch.equal(model(x), expected)


def test_layers_that_accelerate_has_put_on_a_device_are_merged(device):
    accelerate = pytest.importorskip("accelerate")
    net = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)}).to(device)
    net.forward = lambda x: net["b"](net["a"](x))
    model = peft.get_peft_model(net, LowRankConfig(r=2, target_modules=["a"]))
    with torch.no_grad():
        change = changes(model)[0]
        X = change.update.weight
        X.copy_(change.update.manifold.random(*X.shape, device=device))
    base = tuner_layers(model)[0].base_layer
    accelerate.hooks.add_hook_to_module(base, accelerate.hooks.AlignDevicesHook(device))
    x = torch.randn(3, 8, device=device)
    expected = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected)


def test_lora_of_twice_the_rank_is_the_same_change(device):
    convert = pytest.importorskip("peft", minversion="0.21").convert_to_lora
    x = words(device)
    model = peft.get_peft_model(llama(device).eval(), LowRankConfig(r=2))
    train(model, x)
    expected = tuner_layers(model)[0].get_delta_weight("default")
    config, state = convert(model, rank=4)
    A, B = (
        next(v for k, v in state.items() if "layers.0" in k and "q_proj" in k and part in k)
        for part in ("lora_A", "lora_B")
    )
    scale = config.lora_alpha / config.r
    torch.testing.assert_close(scale * B @ A, expected, rtol=1e-3, atol=1e-5)


def test_the_library_does_not_import_peft_by_itself():
    code = "import sys, lrmanifold; assert not {'peft', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def with_points(model):
    """Every adapter somewhere else than at its start."""
    with torch.no_grad():
        for change in changes(model):
            X = change.update.weight
            X.copy_(change.update.manifold.random(*X.shape, device=X.device))
    return model


@pytest.mark.parametrize("name", ["0", "q_proj", "model"])
def test_a_name_that_would_cost_another_adapter_its_weights_is_refused(name, device):
    config = LowRankConfig(r=2, target_modules=["q_proj"])
    model = peft.get_peft_model(llama(device), config)
    with pytest.raises(ValueError, match=f"name must be none of .*, got '{name}'"):
        model.add_adapter(name, LowRankConfig(r=2, target_modules=["q_proj"]))
    assert list(model.peft_config) == ["default"]
    assert len(peft.get_peft_model_state_dict(model)) == 6


def test_adapters_for_rows_of_a_batch_are_refused_and_not_ignored(device):
    x = words(device)
    model = peft.get_peft_model(llama(device).eval(), LowRankConfig(r=2), "a")
    model.add_adapter("b", LowRankConfig(r=2))
    for call in (model, lambda ids, **names: model.generate(input_ids=ids, **names)):
        with pytest.raises(ValueError, match=r"adapter_names must be None: .*, got \['a', 'b'"):
            call(x, adapter_names=["a", "b", "a", "b"])
    model(x, adapter_names=None)


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
def test_a_tied_weight_is_not_merged_into_the_embeddings(device):
    base = llama(device).eval()
    base.lm_head.weight = base.model.embed_tokens.weight
    targets = ["lm_head", "q_proj"]
    model = with_points(peft.get_peft_model(base, LowRankConfig(r=2, target_modules=targets)))
    x = words(device)
    expected = model(x).logits
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"'lm_head' .*tied to 'model.embed_tokens.weight'"):
            merge()
    assert torch.equal(model(x).logits, expected)
    model.add_adapter("b", LowRankConfig(r=2, target_modules=["q_proj"]))
    model.merge_adapter(["b"])


@pytest.mark.parametrize("r", ["4", None, 2.5])
def test_a_rank_of_another_type_is_named(r, device):
    with pytest.raises(TypeError, match="r must be an integer >= 1, got"):
        peft.get_peft_model(llama(device), LowRankConfig(r=r))
