"""Models inside wrappers: ``torch.compile``, DDP and DataParallel add a level to every name."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel


def _inside(module: nn.Module) -> nn.Module | None:
    """What a wrapper wraps; None for every other module."""
    if isinstance(module, (DataParallel, DistributedDataParallel)):
        return module.module
    # torch.compile's class is slow to import, and TorchScript's dict has no get
    return module._modules["_orig_mod"] if "_orig_mod" in module._modules else None  # noqa: SIM401


def unwrapped(model: nn.Module) -> nn.Module:
    """The model without the wrappers around it."""
    while (inside := _inside(model)) is not None:
        model = inside
    return model


def names_without_wrappers(model: nn.Module) -> dict[str, nn.Module]:
    """All modules by the names that they have without wrappers around the model or in it."""
    found: dict[str, nn.Module] = {}

    def visit(module: nn.Module, name: str) -> None:
        module = unwrapped(module)
        found[name] = module
        for child, inner in module.named_children():
            visit(inner, f"{name}.{child}" if name else child)

    visit(model, "")
    return found


def parameters_without_wrappers(model: nn.Module) -> dict[str, Tensor]:
    """All parameters by those names, shared ones under each."""
    return {
        f"{name}.{key}" if name else key: p
        for name, module in names_without_wrappers(model).items()
        for key, p in module.named_parameters(recurse=False, remove_duplicate=False)
    }
