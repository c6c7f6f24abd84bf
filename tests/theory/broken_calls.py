"""Does a claim notice a library function that is wrong? Break one call at a time.

Each place where a check calls `lrmanifold` is found by running it, then run again with NaN in
place of the floating point numbers of what that call returns. No comparison with NaN is true, so a
check that passes has lost it on the way: a maximum that drops NaN, or ``if defect > tolerance``.
:func:`insensitive` multiplies by a number instead, such as 1.05: what passes then does not depend
on that call, or too little.
"""

from __future__ import annotations

import functools
import inspect
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from theory.core import Claim, Evidence, Sample
from theory.runner import Settings

LIBRARY = "lrmanifold"
CLAIMS = "theory"


class Site(NamedTuple):
    """Where a check calls the library: the function, the caller with its module, and the line."""

    function: str
    caller: str
    line: int


def _is_own(value: Any) -> bool:
    """Whether the library defines it; what torch.compile leaves in a module is of none."""
    return (value.__module__ or "").split(".")[0] == LIBRARY


@functools.lru_cache(maxsize=1)
def _library() -> dict[CodeType, tuple[Any, str, FunctionType]]:
    """Where each function of the library is kept, (module or class, name, it), by its code."""
    found: dict[CodeType, tuple[Any, str, FunctionType]] = {}

    def add(holder: Any, name: str, value: Any) -> None:
        if isinstance(value, FunctionType) and _is_own(value):
            found.setdefault(inspect.unwrap(value).__code__, (holder, name, value))

    for module in _modules(LIBRARY):
        for name, value in list(vars(module).items()):
            add(module, name, value)
            if inspect.isclass(value) and _is_own(value):
                for key, member in list(vars(value).items()):
                    add(value, key, getattr(member, "__func__", member))
    return found


@functools.lru_cache(maxsize=1)
def _decorators() -> set[CodeType]:
    """Code of the library's decorators, of which several may stand between function and caller."""
    found = set()
    for _, _, layer in _library().values():
        while wrapped := getattr(layer, "__wrapped__", None):
            found.add(layer.__code__)
            layer = wrapped
    return found


def _modules(*packages: str) -> list[ModuleType]:
    return [m for key, m in list(sys.modules.items()) if key.split(".")[0] in packages]


def _caller(frame: FrameType | None) -> FrameType | None:
    """The nearest caller that is a claim's; None if the library called itself."""
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        package = module.split(".")[0]
        if package == LIBRARY and frame.f_code not in _decorators():
            return None
        if package == CLAIMS:
            return frame
        frame = frame.f_back
    return None


def _site(code: CodeType, frame: FrameType) -> Site:
    holder, name, _ = _library()[code]
    module = frame.f_globals["__name__"].partition(".")[2]
    caller = f"{module}.{frame.f_code.co_name}"
    return Site(f"{holder.__name__.split('.')[-1]}.{name}", caller, frame.f_lineno)


def poisoned(x: Any, factor: float = math.nan) -> Any:
    """`x` with each floating point number in it times the factor; so what its functions return."""
    if isinstance(x, Tensor):
        return x * factor if x.is_floating_point() or x.is_complex() else x
    if isinstance(x, float):
        return x * factor
    if isinstance(x, tuple):
        parts = [poisoned(part, factor) for part in x]
        return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
    if isinstance(x, list):
        return [poisoned(part, factor) for part in x]
    if isinstance(x, Mapping):
        return {key: poisoned(value, factor) for key, value in x.items()}
    if isinstance(x, FunctionType):
        return lambda *args, **kwargs: poisoned(x(*args, **kwargs), factor)
    return x


def _changed(x: Any) -> bool:
    """Whether :func:`poisoned` changes `x`."""
    if isinstance(x, Tensor):
        return x.is_floating_point() or x.is_complex()
    if isinstance(x, (tuple, list)):
        return any(map(_changed, x))
    if isinstance(x, Mapping):
        return any(map(_changed, x.values()))
    return isinstance(x, (float, FunctionType))


@contextmanager
def _recording() -> Iterator[dict[Site, CodeType]]:
    """The calls of the library whose result has floating point numbers."""
    found: dict[Site, CodeType] = {}
    known, before = _library(), sys.getprofile()

    def on_event(frame: FrameType, event: str, result: Any) -> None:
        if event == "return" and frame.f_code in known and _changed(result):
            plain = not hasattr(known[frame.f_code][2], "__wrapped__")
            if plain and frame.f_back is not None and frame.f_back.f_code in _decorators():
                return  # what a decorator calls for itself
            caller = _caller(frame.f_back)
            if caller is not None:
                found.setdefault(_site(frame.f_code, caller), frame.f_code)

    sys.setprofile(on_event)
    try:
        yield found
    finally:
        sys.setprofile(before)


@contextmanager
def broken(site: Site, code: CodeType, factor: float = math.nan) -> Iterator[None]:
    """Within it the library's function returns NaN, or `factor` times its value, to one caller."""
    holder, name, function = _library()[code]
    original = vars(holder)[name]

    @functools.wraps(function)
    def wrong(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        caller = _caller(sys._getframe(1))
        return result if caller is None or _site(code, caller) != site else poisoned(result, factor)

    # A function may be imported by name, or be in a table: it is replaced wherever it is known.
    wrapper: Any = type(original)(wrong) if function is not original else wrong
    places: list[tuple[dict[str, Any], str]] = []
    if inspect.isclass(holder):
        setattr(holder, name, wrapper)
    else:
        for module in _modules(LIBRARY, CLAIMS):
            tables = [vars(module), *(x for x in vars(module).values() if type(x) is dict)]
            places += [(t, k) for t in tables for k, x in list(t.items()) if x is original]
    for table, key in places:
        table[key] = wrapper
    try:
        yield
    finally:
        if inspect.isclass(holder):
            setattr(holder, name, original)
        for table, key in places:
            table[key] = original


def unnoticed(claim: Claim, settings: Settings) -> tuple[list[Site], int]:
    """Calls whose NaN no longer shows in the evidence of a sample; and how many were broken.

    Noticed is what fails: a sample that is skipped now, though it was not before, hides the NaN.
    """
    lost, tried = list[Site](), set[Site]()
    for seed in settings.seeds(claim.trials):
        sample = claim.sample(seed, settings.dtype, settings.device)
        with _recording() as calls:
            clean = claim.check(sample)
        for site, code in calls.items() if clean.hypotheses_met else ():
            if site not in tried:
                with broken(site, code):
                    found = judged(claim, sample)
                tried.add(site)
                lost += [site] if found.holds or not found.hypotheses_met else []
    return lost, len(tried)


def insensitive(claim: Claim, settings: Settings, factors: tuple[float, ...]) -> list[Site]:
    """Calls whose value may be `factor` times too large without any sample that notices.

    Noticed is what fails a run: a sample that does not hold, and an extremal example that is no
    longer attained.
    """
    exact = torch.float64, settings.device
    places = [(e.sample(settings.seeds(1)[0], *exact), e.least) for e in claim.extremal]
    seeds = settings.seeds(claim.trials)
    places += [(claim.sample(seed, settings.dtype, settings.device), 0.0) for seed in seeds]
    calls = dict[Site, CodeType]()
    met = []
    for sample, least in places:
        with _recording() as found:
            clean = claim.check(sample)
        calls |= found
        if clean.hypotheses_met:
            assert clean.holds
            assert clean.ratio >= least
            met.append((sample, least))

    def noticed(found: Evidence, least: float) -> bool:
        if not found.hypotheses_met:
            return least > 0.0
        return not found.holds or found.ratio < least

    lost = []
    for site, code in calls.items():
        for factor in factors:
            with broken(site, code, factor):
                if not any(noticed(judged(claim, x), least) for x, least in met):
                    lost.append(site)
                    break
    return lost


def judged(claim: Claim, sample: Sample) -> Evidence:
    """The check's evidence; a violation if it cannot be computed, as in a run."""
    try:
        return claim.check(sample)
    except Exception:
        return Evidence(math.nan, math.nan, holds=False)
