"""Networks for images, plain torch modules that ``factorize`` converts.

For 32 x 32 images VGG16 with batch norm, WideResNet-16-4 and a small vision transformer; for small
ones the two convolutions that are usual in adversarial training, and ``plain`` twice as wide,
without its batch norms or with norms that only take the mean away. The smaller ones of
:mod:`lrmanifold.experiments.models` are built by :func:`build` too.
They take normalised images (N, C, H, W) and give logits (N, classes).
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrmanifold.experiments import models as small
from lrmanifold.experiments.data import Dataset
from lrmanifold.nn import MeanOnlyBatchNorm

NAMES = (
    *small.NAMES,
    *("two-conv", "plain-wide", "plain-no-norm", "plain-mean-norm", "vgg16", "wrn16_4", "vit"),
)
_VGG16 = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))


def two_conv(in_channels: int = 1, classes: int = 10, image_size: int = 28) -> nn.Sequential:
    """Two convolutions 4 x 4 of stride 2 with 16 and 32 filters, then 100 units."""
    side = image_size // 2 // 2
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(in_channels, 16, 4, stride=2, padding=1),
            act1=nn.ReLU(),
            conv2=nn.Conv2d(16, 32, 4, stride=2, padding=1),
            act2=nn.ReLU(),
            flatten=nn.Flatten(),
            fc1=nn.Linear(32 * side * side, 100),
            act3=nn.ReLU(),
            fc2=nn.Linear(100, classes),
        )
    )


def plain_no_norm(in_channels: int = 3, classes: int = 10) -> nn.Sequential:
    """The network ``plain`` with a bias in every convolution in place of the batch norm behind it.

    What a bound on a kernel does where nothing rescales its channels afterwards.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for name, layer in small.plain(in_channels, classes).named_children():
        if isinstance(layer, nn.Conv2d):
            layer.bias = nn.Parameter(torch.zeros(layer.out_channels))
        if not isinstance(layer, nn.BatchNorm2d):
            layers[name] = layer
    return nn.Sequential(layers)


def plain_mean_norm(in_channels: int = 3, classes: int = 10) -> nn.Module:
    """The network ``plain`` with norms that take the mean of each channel away and scale nothing.

    The bound on a kernel is one on the layer with its norm here.
    """
    return MeanOnlyBatchNorm.convert(small.plain(in_channels, classes))


def vgg16(in_channels: int = 3, classes: int = 10) -> nn.Sequential:
    """VGG16 for 32 x 32: 13 convolutions 3 x 3 with batch norm, one linear layer; 14.7 M weights.

    Layers ``conv1 ... conv13`` and ``fc``; 2 x 2 max pooling after each of the five stages.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    count = 0
    for stage, (width, depth) in enumerate(_VGG16, 1):
        for _ in range(depth):
            count += 1
            layers[f"conv{count}"] = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
            layers[f"norm{count}"] = nn.BatchNorm2d(width)
            layers[f"act{count}"] = nn.ReLU()
            in_channels = width
        layers[f"pool{stage}"] = nn.MaxPool2d(2)
    layers["flatten"] = nn.Flatten()
    layers["fc"] = nn.Linear(512, classes)
    network = nn.Sequential(layers)
    _kaiming(network)
    return network


class WideBlock(nn.Module):
    """Pre-activation residual block: x + conv2(act(norm(conv1(act(norm x)))))."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.shortcut: nn.Module | None = None
        if in_channels != out_channels or stride != 1:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Shape (N, C', H/stride, W/stride)."""
        z = F.relu(self.norm1(x))
        y = self.conv2(F.relu(self.norm2(self.conv1(z))))
        return y + (x if self.shortcut is None else self.shortcut(z))


def wide_resnet16_4(in_channels: int = 3, classes: int = 10) -> nn.Sequential:
    """WideResNet-16-4: three groups of two blocks, 64, 128 and 256 channels; 2.7 M weights."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        stem=nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
    )
    channels = 16
    for group, width in enumerate((64, 128, 256), 1):
        for block in (1, 2):
            stride = 2 if group > 1 and block == 1 else 1
            layers[f"group{group}_{block}"] = WideBlock(channels, width, stride)
            channels = width
    layers["norm"] = nn.BatchNorm2d(channels)
    layers["act"] = nn.ReLU()
    layers["pool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["fc"] = nn.Linear(channels, classes)
    network = nn.Sequential(layers)
    _kaiming(network)
    return network


class Attention(nn.Module):
    """Self-attention with separate linear layers, which ``factorize`` can replace one by one."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Shape (N, tokens, width) to the same."""
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class EncoderBlock(nn.Module):
    """x + attention(norm x), then x + mlp(norm x)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Shape (N, tokens, width) to the same."""
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ViT(nn.Module):
    """A small vision transformer: patches, learned positions, mean over tokens."""

    def __init__(
        self,
        in_channels: int = 3,
        classes: int = 10,
        image_size: int = 32,
        *,
        patch: int = 4,
        width: int = 192,
        depth: int = 6,
        heads: int = 3,
    ) -> None:
        super().__init__()
        if image_size % patch:
            raise ValueError(f"patch must divide image_size = {image_size}, got {patch}")
        self.patches = nn.Conv2d(in_channels, width, patch, patch)
        tokens = (image_size // patch) ** 2
        self.positions = nn.Parameter(0.02 * torch.randn(1, tokens, width))
        self.blocks = nn.Sequential(*(EncoderBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes)."""
        z = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.fc(self.norm(self.blocks(z)).mean(1))


def build(name: str, dataset: Dataset) -> nn.Module:
    """The named model (one of :data:`NAMES`) with the input and output sizes of `dataset`."""
    channels, height, width = dataset.image_shape
    if name in small.NAMES:
        return small.build(name, dataset)
    if name not in NAMES:
        raise ValueError(f"name must be one of {NAMES}, got {name!r}")
    if name == "two-conv":
        return two_conv(channels, dataset.classes, height)
    if (height, width) != (32, 32):
        raise ValueError(f"{name} needs 32 x 32 images, got {height} x {width}")
    if name == "plain-wide":
        return small.plain(channels, dataset.classes, widths=(64, 128, 256))
    if name == "plain-no-norm":
        return plain_no_norm(channels, dataset.classes)
    if name == "plain-mean-norm":
        return plain_mean_norm(channels, dataset.classes)
    if name == "vgg16":
        return vgg16(channels, dataset.classes)
    if name == "wrn16_4":
        return wide_resnet16_4(channels, dataset.classes)
    return ViT(channels, dataset.classes)


def convolutional(name: str) -> bool:
    """Whether most of the work is in convolutions of images."""
    return name in ("lenet5", "vgg16", "wrn16_4")


def _kaiming(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
