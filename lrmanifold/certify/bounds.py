"""What is known of a single module: its bound, and where the knowledge is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

Shape = tuple[int, ...]


class BoundError(ValueError):
    """A module or operation has no bound; the message names it and the way out."""


class CertificationError(RuntimeError):
    """A certified sample was broken by an attack: a bound is wrong. Report it."""


@dataclass(frozen=True)
class Bound:
    """What one operation does to distances, and to rounding.

    Attributes
    ----------
    norm : float or Tensor, shape ()
        Lipschitz constant in l2; a tensor with a gradient in training.
    how : str
        How it was obtained, for the report.
    map_cond : float or None
        Condition number on the row space of a linear map, where it is known.
    slope, offset : float
        In float64 the computed output is within ``u (slope ‖x‖ + offset)`` of the exact one in l2,
        u = 2⁻⁵³. The defaults suit elementwise functions good to a few roundings.
    jump : float
        Of a function that jumps: by how much at most, in one entry; `norm` bounds what it does
        otherwise, and `offset` has room for the jump.
    """

    norm: float | Tensor
    how: str
    map_cond: float | None = None
    slope: float = 16.0
    offset: float = 0.0
    jump: float = 0.0


@dataclass
class Context:
    """What a bound may need beside the module.

    Attributes
    ----------
    exact : bool
        True: an upper bound including rounding is asked for, in float64. False: a differentiable
        number for training, in the dtype of the module.
    name : str
        Qualified name of the module.
    input_shape, output_shape : tuple of int or None
        Without the batch; None where ``input_shape`` was not given.
    memory : dict
        Kept between evaluations of one network: warm starts of iterations.
    """

    exact: bool
    name: str = ""
    input_shape: Shape | None = None
    output_shape: Shape | None = None
    memory: dict[str, Tensor] = field(default_factory=dict)

    def remember(self, value: Tensor) -> None:
        """Keep a tensor for the next evaluation; in place, as a captured graph finds it again."""
        old = self.memory.get(self.name)
        if old is None or (old.shape, old.dtype, old.device) != (
            value.shape, value.dtype, value.device
        ):  # fmt: skip
            self.memory[self.name] = value.detach().clone()
        else:
            old.copy_(value.detach())

    def need_shape(self, why: str) -> Shape:
        """The shape of the input, or an error that asks for it."""
        if self.input_shape is None:
            raise BoundError(f"{self.name or 'the model'}: {why}; give input_shape, without batch")
        return self.input_shape


BoundFunction = Callable[[Any, Context], "Bound | float | Tensor"]
_REGISTRY: dict[type[nn.Module], BoundFunction] = {}


def register_bound(module_type: type[nn.Module], function: BoundFunction) -> None:
    """Tell the certificate what a module type of one's own does to l2 distances.

    Parameters
    ----------
    module_type : type
        A subclass of nn.Module. The entry serves this type and subclasses that change none of its
        methods. A later entry replaces an earlier one.
    function : callable (module, context) -> float, Tensor or Bound
        The Lipschitz constant of ``module.forward`` per sample, from l2 to l2. **It is trusted**:
        an upper bound for every input, for the weights as they are, in evaluation mode. With
        ``context.exact`` it must include the rounding of its own computation; without, it must be
        differentiable in the weights. A plain number stands for an elementwise function good to a
        few roundings; return :class:`Bound` to say more. No bound: raise :class:`BoundError`. A
        number that is negative or not finite is refused, but for a tensor on an accelerator in
        training.

    Raises
    ------
    TypeError
        If `module_type` is no module type or `function` not callable.

    Examples
    --------
    >>> class Halve(torch.nn.Module):
    ...     def forward(self, x):
    ...         return x / 2
    >>> lrm.certify.register_bound(Halve, lambda module, context: 0.5)
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise TypeError(f"module_type must be a subclass of nn.Module, got {module_type!r}")
    if not callable(function):
        raise TypeError(f"function must be callable (module, context), got {function!r}")
    _REGISTRY[module_type] = function


def bounded(*types: type[nn.Module]) -> Callable[[BoundFunction], BoundFunction]:
    """Decorator form of :func:`register_bound`, for several types."""

    def enter(function: BoundFunction) -> BoundFunction:
        for module_type in types:
            register_bound(module_type, function)
        return function

    return enter


# Methods that a subclass may define without changing what the base class computes.
_HARMLESS = {
    "__init__",
    "__repr__",
    "__deepcopy__",
    "__copy__",
    "__reduce_ex__",
    "__reduce__",
    "__annotate__",
    "__annotate_func__",
    "__getstate__",
    "__setstate__",
    "extra_repr",
    "reset_parameters",
}


def changed_method(module: nn.Module, base: type[nn.Module]) -> str | None:
    """A method or property of `base` that the module's class, or the module itself, replaced."""
    for cls in type(module).__mro__:
        if cls is base:
            break
        for name in vars(cls):
            # whatever stands there now, also what cannot be called itself (partialmethod)
            held = getattr(base, name, None)
            if (callable(held) or isinstance(held, property)) and name not in _HARMLESS:
                return f"{cls.__name__}.{name}"
    for name, value in vars(module).items():
        if callable(value) and callable(getattr(base, name, None)):
            return f"this object's own {name}"
    return None


def _entry(module: nn.Module) -> type[nn.Module] | None:
    """The known type whose function `module` has, or None."""
    for cls in type(module).__mro__:
        if cls in _REGISTRY:
            return cls if changed_method(module, cls) is None else None
    return None


def find_bound(module: nn.Module) -> BoundFunction | None:
    """The entry that serves `module`, or None.

    A subclass that replaces a method of a known type is unknown: its constant is another one.
    """
    cls = _entry(module)
    return None if cls is None else _REGISTRY[cls]


def computes_as(module: nn.Module, types: tuple[type[nn.Module], ...]) -> bool:
    """Whether `module` has the function of one of these types.

    ``isinstance`` would not do: a subclass with another forward may have an entry of its own, and
    then its weight does not say what it computes.
    """
    return _entry(module) in types


def module_bound(module: nn.Module, context: Context) -> Bound:
    """The bound of a module whose type is known; :class:`BoundError` otherwise."""
    function = find_bound(module)
    if function is None:
        raise BoundError(no_bound_words(module, context.name))
    found = function(module, context)
    plain = not isinstance(found, Bound)
    if not isinstance(found, Bound):
        found = Bound(found, "register_bound")
    norm = found.norm
    if isinstance(norm, Tensor) and norm.device.type != "cpu" and not context.exact:
        return found  # in training an accelerator is not waited for
    value = float(norm.detach()) if isinstance(norm, Tensor) else float(norm)
    if not 0.0 <= value < float("inf"):
        raise BoundError(
            f"{context.name or 'the model'} ({type(module).__name__}): its bound must be finite "
            f"and at least 0, got {value}"
        )
    # a few roundings of the output, which may be larger than the input
    return replace(found, slope=found.slope * max(1.0, value)) if plain else found


def no_bound_words(
    module: nn.Module, name: str, wanted: tuple[type[nn.Module], ...] | None = None
) -> str:
    """Names the module, says why it has no bound (among `wanted` types), and what can be done."""
    kind = type(module).__name__
    if wanted is not None and find_bound(module) is not None:
        names = " or ".join(t.__name__ for t in wanted)
        return f"{name} ({kind}): only the function of a {names} can be counted in this place"
    for cls in type(module).__mro__:
        if cls in _REGISTRY:
            changed = changed_method(module, cls)
            return (
                f"{name or 'the model'} ({kind}) is a {cls.__name__} with another function "
                f"({changed}), so that bound does not hold: register_bound({kind}, fn) with its own"
            )
    return (
        f"{name or 'the model'} ({kind}) has no known Lipschitz constant: replace it, or "
        f"register_bound({kind}, fn) if you can prove one"
    )
