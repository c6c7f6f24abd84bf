"""Dense reference networks, plain torch modules with readable names; ``factorize`` converts them.

They take normalised images (N, C, H, W) and give logits (N, classes). Weights are torch's default
initialisation: call ``torch.manual_seed`` first for the same network twice.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from torch import nn

from .._arguments import check_integer, shown
from ..nn import MaxMin
from .data import Dataset

NAMES = ("mlp", "mlp-maxmin", "lenet5", "plain")


def mlp(
    in_features: int,
    classes: int,
    hidden: Sequence[int] = (256, 256),
    activation: Callable[[], nn.Module] = nn.LeakyReLU,
) -> nn.Sequential:
    """Fully connected network ``fc1, act1, fc2, act2, ...``, LeakyReLU between the layers.

    Images are flattened first, so `in_features` is C * H * W. ``hidden=()`` is one linear layer.
    """
    if isinstance(hidden, (str, bytes)) or not isinstance(hidden, Sequence):
        raise TypeError(f"hidden must be a sequence of integers >= 1, got {shown(hidden)}")
    sizes = [
        check_integer("in_features", in_features, low=1),
        *(check_integer(f"hidden[{i}]", size, low=1) for i, size in enumerate(hidden)),
        check_integer("classes", classes, low=1),
    ]
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for i in range(1, len(sizes)):
        if i > 1:
            layers[f"act{i - 1}"] = activation()
        layers[f"fc{i}"] = nn.Linear(sizes[i - 1], sizes[i])
    return nn.Sequential(layers)


def lenet5(in_channels: int = 1, classes: int = 10, image_size: int = 28) -> nn.Sequential:
    """LeNet5 as in the CondLR paper: 20 and 50 filters 5 x 5, then 500 and `classes` units.

    Each convolution (no padding) is followed by 2 x 2 max pooling; LeakyReLU throughout. For
    28 x 28 images ``fc1`` has 50 * 4 * 4 = 800 inputs and the network 431,080 parameters. Images
    below 16 x 16 leave no pixel for it: use :func:`mlp`.
    """
    in_channels = check_integer("in_channels", in_channels, low=1)
    classes = check_integer("classes", classes, low=1)
    image_size = check_integer("image_size", image_size)
    side = ((image_size - 4) // 2 - 4) // 2
    if side < 1:
        raise ValueError(
            "lenet5 needs images of at least 16 x 16 (5 x 5 convolution and 2 x 2 pooling, twice), "
            f"got image_size={image_size}: use the mlp"
        )
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(in_channels, 20, 5),
            pool1=nn.MaxPool2d(2),
            act1=nn.LeakyReLU(),
            conv2=nn.Conv2d(20, 50, 5),
            pool2=nn.MaxPool2d(2),
            act2=nn.LeakyReLU(),
            flatten=nn.Flatten(),
            fc1=nn.Linear(50 * side * side, 500),
            act3=nn.LeakyReLU(),
            fc2=nn.Linear(500, classes),
        )
    )


def plain(
    in_channels: int = 3, classes: int = 10, widths: Sequence[int] = (32, 64, 128)
) -> nn.Sequential:
    """A small convolutional network for 32 x 32 images that two CPU cores train in minutes.

    A stem of 24 filters 3 x 3, then for each width a block ``conv, pool, norm, relu, conv, norm,
    relu`` that halves the image, mean over the pixels, and a linear ``head``. Convolutions start
    as the identity on as many channels as they can (Dirac), with torch's initialisation on the
    rest.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()

    def convolution(name: str, inside: int, out: int) -> None:
        conv = nn.Conv2d(inside, out, 3, padding=1, bias=False)
        nn.init.dirac_(conv.weight[:inside])
        layers[name] = conv

    def activation(place: str, width: int) -> None:
        layers[f"norm{place}"], layers[f"relu{place}"] = nn.BatchNorm2d(width), nn.ReLU()

    width = 24
    convolution("stem", in_channels, width)
    activation("0", width)
    for block, out in enumerate(widths, 1):
        convolution(f"conv{block}a", width, out)
        layers[f"pool{block}"] = nn.MaxPool2d(2)
        activation(f"{block}a", out)
        convolution(f"conv{block}b", out, out)
        activation(f"{block}b", out)
        width = out
    layers["mean"], layers["flatten"] = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    layers["head"] = nn.Linear(width, classes)
    return nn.Sequential(layers)


def build(name: str, dataset: Dataset) -> nn.Sequential:
    """The named model, one of `NAMES`, with the input and output sizes of `dataset`."""
    if not hasattr(dataset, "image_shape") or not hasattr(dataset, "classes"):
        raise TypeError(f"dataset must be a Dataset, got {shown(dataset)}")
    channels, height, width = dataset.image_shape
    if name == "mlp":
        return mlp(channels * height * width, dataset.classes)
    if name == "mlp-maxmin":  # keeps lengths, for certificates
        return mlp(channels * height * width, dataset.classes, activation=MaxMin)
    if name == "lenet5":
        if height != width:
            raise ValueError(f"lenet5 needs square images, got {height} x {width}: use the mlp")
        return lenet5(channels, dataset.classes, height)
    if name == "plain":
        if min(height, width) < 8:
            raise ValueError(f"plain needs images of at least 8 x 8, got {height} x {width}")
        return plain(channels, dataset.classes)
    raise ValueError(f"name must be one of {NAMES}, got {name!r}")
