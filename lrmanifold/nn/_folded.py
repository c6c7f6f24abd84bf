"""What a folded layer is: two of torch's layers that answer like the one they stand for."""

from __future__ import annotations

from typing import Any, Optional

from torch import Tensor, nn


class _Folded(nn.Sequential):
    """Two layers in a row, V and then U S; ``weight`` is their product, formed at each call.

    Code that reads ``layer.weight``, ``layer.bias`` or ``layer.in_features`` instead of calling the
    layer, as torch's transformer does, gets what the dense layer would hold. The state dict is that
    of the plain ``nn.Sequential``, which computes the same.
    """

    # TorchScript compiles properties unless they are named here.
    __jit_unused_properties__ = ["weight", "bias"]  # noqa: RUF012

    @property
    def weight(self) -> Tensor:
        """The dense weight, with gradients for the two factors."""
        raise NotImplementedError  # the abstract contract: each shape has its product

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias, which is that of the second layer."""
        return self[1].bias  # type: ignore[return-value]

    def take_bias(self, bias: nn.Parameter | None) -> None:
        """Use `bias` itself, not a copy."""
        self[1].register_parameter("bias", bias)


class FoldedLinear(_Folded):
    """``nn.Linear`` as two thin ones."""

    def __init__(self, first: nn.Linear, last: nn.Linear) -> None:
        super().__init__(first, last)
        self.in_features, self.out_features = first.in_features, last.out_features

    @property
    def weight(self) -> Tensor:
        """(U S) Vᵀ, shape (out_features, in_features)."""
        first: Any = self[0]
        last: Any = self[1]
        return last.weight @ first.weight


class FoldedTransposed(FoldedLinear):
    """transformers' ``Conv1D`` as two thin linear layers."""

    def __init__(self, first: nn.Linear, last: nn.Linear) -> None:
        super().__init__(first, last)
        self.nx, self.nf = first.in_features, last.out_features

    @property
    def weight(self) -> Tensor:
        """V (U S)ᵀ, shape (inputs, outputs)."""
        return super().weight.mT


class FoldedEmbedding(_Folded):
    """``nn.Embedding`` as a thin table and a linear layer."""

    def __init__(self, first: nn.Embedding, last: nn.Linear) -> None:
        super().__init__(first, last)
        self.num_embeddings, self.embedding_dim = first.num_embeddings, last.out_features
        self.padding_idx = first.padding_idx

    # in words that TorchScript reads
    def forward(self, ids: Tensor) -> Tensor:
        """As torch's, in the dtype of the table, within autocast too (but rounded there)."""
        return self[1](self[0](ids)).to(self[0].weight.dtype)

    @property
    def weight(self) -> Tensor:
        """(U S) Vᵀ, shape (num_embeddings, embedding_dim)."""
        first: Any = self[0]
        last: Any = self[1]
        return first.weight @ last.weight.mT


class FoldedConvTranspose(_Folded):
    """A transposed convolution as a 1 x 1 convolution and r filters (for each group)."""

    def __init__(self, first: Any, last: Any) -> None:
        super().__init__(first, last)
        self.in_channels, self.out_channels = first.in_channels, last.out_channels
        names = ("kernel_size", "stride", "padding", "output_padding", "dilation", "groups")
        for name in (*names, "padding_mode"):
            setattr(self, name, getattr(last, name))

    # in words that TorchScript reads
    def forward(self, x: Tensor, output_size: Optional[list[int]] = None) -> Tensor:  # noqa: UP045
        """As torch's."""
        return self[1](self[0](x), output_size)

    @property
    def weight(self) -> Tensor:
        """The kernel, shape (in_channels, out_channels / groups, *kernel_size)."""
        first: Any = self[0]
        last: Any = self[1]
        mix = first.weight.flatten(1).unflatten(0, (last.groups, -1))
        filters = last.weight.unflatten(0, (last.groups, -1)).flatten(2)
        return (mix.mT @ filters).reshape(self.in_channels, *last.weight.shape[1:])


class FoldedConv(_Folded):
    """A convolution as r filters (for each group) and a 1 x 1 convolution."""

    def __init__(self, first: Any, last: Any) -> None:
        super().__init__(first, last)
        self.in_channels, self.out_channels = first.in_channels, last.out_channels
        for name in ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"):
            setattr(self, name, getattr(first, name))

    @property
    def weight(self) -> Tensor:
        """The kernel, shape (out_channels, in_channels / groups, *kernel_size)."""
        first: Any = self[0]
        last: Any = self[1]
        groups = first.groups
        filters = first.weight.unflatten(0, (groups, -1)).flatten(2)
        mix = last.weight.flatten(1).unflatten(0, (groups, -1))
        return (mix @ filters).reshape(self.out_channels, *first.weight.shape[1:])
