"""Factorized models of transformers go to a folder and come back; a hub mixin does by itself."""

from __future__ import annotations

import copy
import json
import pickle
import warnings

import pytest
import torch
from torch import nn

import lrmanifold as lrm
from lrmanifold.interop import huggingface
from lrmanifold.nn import LowRankEmbedding, LowRankLayer, LowRankTransposedLinear


def gpt2():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 60, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()


def saved(model, folder, **options):
    with pytest.warns(UserWarning, match=r"interop\.huggingface\.from_pretrained"):
        model.save_pretrained(folder, **options)


@pytest.mark.parametrize("include", [None, ["*", "transformer.wte"]])
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_gpt2_is_saved_with_its_ranks_and_comes_back(tmp_path, include, shard):
    model = gpt2()
    lrm.factorize(model, 0.25, include=include)
    blocks = [m for m in model.modules() if isinstance(m, LowRankTransposedLinear)]
    assert len(blocks) == 8
    saved(model, tmp_path, max_shard_size=shard)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["lrmanifold"]["layers"]["transformer.h.0.attn.c_attn"]["rank"] == 8
    again = huggingface.from_pretrained(type(model), str(tmp_path))
    assert isinstance(again.transformer.wte, LowRankEmbedding) == (include is not None)
    assert again.lm_head.weight is again.transformer.wte.weight
    ids = torch.randint(60, (2, 9))
    torch.testing.assert_close(again(ids).logits, model(ids).logits)
    assert not again.training
    assert lrm.nn.structure(again) == lrm.nn.structure(model)
    with pytest.raises((RuntimeError, ValueError)):
        type(model).from_pretrained(tmp_path)


def vit():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes)).eval()
    return model, torch.randn(2, 3, 16, 16)


def mixtral():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 60}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes)).eval()
    return model, torch.randint(60, (2, 9))


@pytest.mark.parametrize("make", [vit, mixtral])
def test_models_that_transformers_saves_under_older_names_come_back(tmp_path, make):
    model, x = make()
    lrm.factorize(model, 0.25)
    saved(model, tmp_path)
    again = huggingface.from_pretrained(type(model), str(tmp_path))
    torch.testing.assert_close(again(x).logits, model(x).logits)
    assert lrm.nn.structure(again) == lrm.nn.structure(model)


def test_ranks_are_those_at_the_time_of_saving_and_auto_classes_load_them(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = lrm.factorize(gpt2(), 8)
    model.transformer.h[0].attn.c_attn = LowRankTransposedLinear(96, 32, 3)
    saved(copy.deepcopy(model), tmp_path)
    again = huggingface.from_pretrained(
        transformers.AutoModelForCausalLM, str(tmp_path), dtype=torch.float64
    )
    assert again.transformer.h[0].attn.c_attn.rank == 3
    assert again.dtype == torch.float64
    text = again.generate(torch.tensor([[1, 2]]), max_new_tokens=3, do_sample=False)
    expected = model.generate(torch.tensor([[1, 2]]), max_new_tokens=3, do_sample=False)
    assert torch.equal(text, expected)


def test_a_densified_model_is_saved_as_always(tmp_path):
    model = lrm.factorize(gpt2(), 8)
    saved(model, tmp_path / "low")
    expected = model(torch.tensor([[3, 1]])).logits
    pickle.loads(pickle.dumps(model))
    lrm.densify(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.save_pretrained(tmp_path / "dense")
    assert "lrmanifold" not in (tmp_path / "dense" / "config.json").read_text()
    again = type(model).from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(again(torch.tensor([[3, 1]])).logits, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="has no 'lrmanifold': load it by GPT2LMHeadModel"):
        huggingface.from_pretrained(type(model), str(tmp_path / "dense"))


def test_a_model_whose_base_model_was_factorized_comes_back_with_its_ranks_at_saving(tmp_path):
    model, ids = gpt2(), torch.randint(60, (2, 9))
    lrm.factorize(model.transformer, 8, exclude="h.0.*")
    model.save_pretrained(tmp_path / "part")
    again = huggingface.from_pretrained(type(model), str(tmp_path / "part"))
    torch.testing.assert_close(again(ids).logits, model(ids).logits)
    before = lrm.nn.structure(model)
    assert lrm.nn.structure(again) == before
    assert next(iter(before["layers"])).startswith("transformer.h.1.")
    saved(again, tmp_path / "whole")  # it is known as low-rank now
    third = huggingface.from_pretrained(type(model), str(tmp_path / "whole"))
    assert lrm.nn.structure(third) == before
    # ranks that changed since come from the weights
    other = lrm.factorize(gpt2(), 3, exclude="transformer.h.0.*")
    model.load_state_dict(other.state_dict())
    model.save_pretrained(tmp_path / "changed")
    fourth = huggingface.from_pretrained(type(model), str(tmp_path / "changed"))
    torch.testing.assert_close(fourth(ids).logits, other(ids).logits)


def test_a_model_of_which_a_smaller_part_was_factorized_is_refused_at_loading(tmp_path):
    model = gpt2()
    lrm.factorize(model.transformer.h[0], 8)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="if a part of it was factorized"):
        huggingface.from_pretrained(type(model), str(tmp_path))


def test_a_model_whose_base_model_was_densified_is_saved_as_always(tmp_path):
    model, ids = lrm.factorize(gpt2(), 8), torch.randint(60, (2, 9))
    lrm.densify(model.transformer)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.save_pretrained(tmp_path)
    assert "lrmanifold" not in (tmp_path / "config.json").read_text()
    assert "save_pretrained" not in vars(model)
    again = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(again(ids).logits, model(ids).logits)


def test_options_are_taken_or_refused_by_name(tmp_path):
    saved(lrm.factorize(gpt2(), 8), tmp_path)

    def load(**options):
        return huggingface.from_pretrained(type(gpt2()), str(tmp_path), **options)

    assert load(torch_dtype=torch.bfloat16).dtype == torch.bfloat16
    again = load(local_files_only=True, revision="main", attn_implementation="eager")
    assert (again.dtype, again.config._attn_implementation) == (torch.float32, "eager")
    with pytest.raises(TypeError, match="give dtype or torch_dtype, not both"):
        load(dtype=torch.float64, torch_dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=r"attributes of GPT2Config, got device_map, rank"):
        load(device_map="auto", rank=3)


def test_a_model_with_the_hub_mixin_factorizes_in_its_constructor(tmp_path):
    """The example of lrmanifold.interop.huggingface."""
    hub = pytest.importorskip("huggingface_hub")

    class Net(nn.Module, hub.PyTorchModelHubMixin):
        def __init__(self, rank: int = 8) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
            lrm.factorize(self, rank)

        def forward(self, x):
            return self.body(x)

    model = Net(rank=4).eval()
    model.save_pretrained(tmp_path)
    again = Net.from_pretrained(tmp_path)
    x = torch.randn(3, 32)
    torch.testing.assert_close(again(x), model(x))
    layers = [m for m in again.modules() if isinstance(m, LowRankLayer)]
    assert [layer.rank for layer in layers] == [4, 4]
    assert all(layer.weight.manifold is layer.manifold for layer in layers)


def test_how_a_model_generates_comes_back_with_it(tmp_path):
    model = lrm.factorize(gpt2(), 8)
    model.generation_config.max_new_tokens = 3
    model.generation_config.eos_token_id = 7
    saved(model, tmp_path)
    again = huggingface.from_pretrained(type(model), str(tmp_path))
    assert again.generation_config.max_new_tokens == 3
    assert again.generation_config.eos_token_id == 7
    (tmp_path / "generation_config.json").unlink()
    assert huggingface.from_pretrained(type(model), str(tmp_path)).can_generate()


def test_the_dtype_is_that_of_torch_whatever_was_saved_and_angles_stay_float32(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 60}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    angles = model.model.rotary_emb.inv_freq
    saved(lrm.factorize(model, 0.25).to(torch.bfloat16), tmp_path)
    for cls in (type(model), transformers.AutoModelForCausalLM):
        again = huggingface.from_pretrained(cls, str(tmp_path))
        assert {p.dtype for p in again.parameters()} == {torch.float32}
        half = huggingface.from_pretrained(cls, str(tmp_path), dtype=torch.bfloat16)
        assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
        assert torch.equal(half.model.rotary_emb.inv_freq, angles)
    assert torch.get_default_dtype() == torch.float32


def test_what_does_not_fit_is_one_kind_of_error(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = lrm.factorize(gpt2(), 8)
    saved(model, tmp_path)

    def load(match, cls=None, **options):
        with pytest.raises(ValueError, match=match):
            huggingface.from_pretrained(cls or type(model), str(tmp_path), **options)

    load("cls must be a class for GPT2Config, .*, got BertModel", transformers.BertModel)
    load("(?s)cannot be loaded: .*size mismatch for transformer.wte", n_embd=64)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    load(r"model.safetensors: is damaged \(")
