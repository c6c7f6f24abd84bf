"""Shares, compression and energy leave the output layer dense, unless it is named."""

import pytest
import torch
from torch import nn

import lrmanifold as lrm
from lrmanifold.nn.plan import make_plan, output_layer


def net(inputs=128, outputs=10):
    return nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(inputs, outputs))


def ranks(**options):
    return {d.name: d.rank for d in make_plan(net(), **options).decisions}


@pytest.mark.parametrize(
    "rule",
    [{"rank": 0.25}, {"compression": 0.4}, {"energy": 0.5}, {"rank": {"*": 0.25}}],
)
def test_the_output_layer_stays_dense(rule):
    assert ranks(**rule)["2"] is None
    assert ranks(**rule)["0"] is not None
    assert "output layer" in str(make_plan(net(), **rule))
    named = ranks(**rule, include=["0", "2"], keep_larger=True)
    assert named["2"] is not None


@pytest.mark.parametrize("rule", [{"rank": 4}, {"rank": {"2": 0.4}}, {"rank": {"*": 4}}])
def test_ranks_and_names_that_are_given_are_followed(rule):
    assert ranks(**rule)["2"] == 4


@pytest.mark.parametrize(
    ("inputs", "outputs", "found"),
    [(128, 63, "2"), (128, 64, None), (4096, 1000, "2"), (2048, 1000, None), (3072, 768, None)],
)
def test_what_an_output_layer_is(inputs, outputs, found):
    assert output_layer(net(inputs, outputs)) == found


def test_a_layer_alone_and_what_is_left_of_a_second_call_are_no_output_layers():
    assert output_layer(nn.Linear(64, 10)) is None
    model = lrm.factorize(net(), rank=4)
    assert output_layer(model) is None


def test_the_rank_may_be_given_by_position():
    assert lrm.factorize(net(), 4)[0].rank == 4


# -- the structures of large libraries, with their own names and sizes


def tree(**shapes):
    """Linear layers by qualified name, in this order; "__" stands for a dot."""
    root = nn.Module()
    with torch.device("meta"):
        for name, (inputs, outputs) in shapes.items():
            *path, last = name.split("__")
            owner = root
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner._modules[part]
            owner.add_module(last, nn.Linear(inputs, outputs))
    return root


TREES = {
    # torchvision
    "resnet50": ({"fc": (2048, 1000)}, "fc"),
    "vgg16": (
        {"classifier__0": (25088, 4096), "classifier__6": (4096, 1000)},
        "classifier.6",
    ),
    "mobilenet_v2": ({"classifier__1": (1280, 1000)}, "classifier.1"),
    "vit_b_16": (
        {"encoder__layers__0__mlp__3": (3072, 768), "heads__head": (768, 1000)},
        "heads.head",
    ),
    "swin_t": ({"features__1__0__mlp__3": (384, 96), "head": (768, 1000)}, "head"),
    # timm
    "convnext": (
        {"stages__3__blocks__2__mlp__fc2": (3072, 768), "head__fc": (768, 1000)},
        "head.fc",
    ),
    "timm vit": ({"blocks__11__mlp__fc2": (3072, 768), "head": (768, 21843)}, "head"),
    "timm vit without a head": (
        {"blocks__11__mlp__fc1": (768, 3072), "blocks__11__mlp__fc2": (3072, 768)},
        None,
    ),
    "timm with a block called fc": ({"blocks__11__fc": (768, 768)}, None),
    # transformers
    "bert, 3 classes": ({"bert__pooler__dense": (768, 768), "classifier": (768, 3)}, "classifier"),
    "bert, questions": (
        {"bert__encoder__layer__11__output__dense": (3072, 768), "qa_outputs": (768, 2)},
        "qa_outputs",
    ),
    "bert alone": (
        {"encoder__layer__11__output__dense": (3072, 768), "pooler__dense": (768, 768)},
        None,
    ),
    "bert alone, no pooler": ({"encoder__layer__11__output__dense": (3072, 768)}, None),
    "llama": (
        {"model__layers__31__mlp__down_proj": (11008, 4096), "lm_head": (4096, 32000)},
        "lm_head",
    ),
    "llama alone": ({"layers__31__mlp__down_proj": (11008, 4096)}, None),
    "t5": (
        {"decoder__block__5__layer__2__DenseReluDense__wo": (2048, 512), "lm_head": (512, 32128)},
        "lm_head",
    ),
    "gpt-2, classes": ({"score": (768, 2)}, "score"),
}  # fmt: skip


@pytest.mark.parametrize("name", TREES)
def test_heads_of_large_libraries_are_found_and_feed_forward_parts_are_none(name):
    shapes, found = TREES[name]
    model = tree(**shapes)
    assert output_layer(model) == found
    plan = {d.name: d for d in make_plan(model, rank=0.25).decisions}
    assert {n for n, d in plan.items() if d.rank is None} == ({found} if found else set())
    if found:
        assert "output layer" in plan[found].reason
        assert make_plan(model, rank=0.25, include=found, keep_larger=True).decisions[-1].rank


def test_the_last_projection_of_attention_is_no_output_layer():
    model = nn.Sequential(nn.Linear(64, 10), nn.MultiheadAttention(32, 2))
    assert output_layer(model) == "0"
