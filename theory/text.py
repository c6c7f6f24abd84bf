r"""LaTeX to plain text: statements as a terminal can show them.

Covers what the statements of this collection use, and no more; a test sees to it that no statement
is left with a backslash.
"""

from __future__ import annotations

import re

_SYMBOLS = {
    "alpha": "α", "beta": "β", "gamma": "γ", "delta": "δ", "Delta": "Δ", "varepsilon": "ε",
    "epsilon": "ε", "eta": "η", "zeta": "ζ", "theta": "θ", "Theta": "Θ", "kappa": "κ",
    "lambda": "λ", "Lambda": "Λ", "mu": "μ", "nu": "ν", "xi": "ξ", "pi": "π", "Pi": "Π",
    "rho": "ρ", "sigma": "σ", "Sigma": "Σ", "tau": "τ", "phi": "φ", "varphi": "φ", "Phi": "Φ",
    "psi": "ψ", "omega": "ω", "Omega": "Ω", "le": " <= ", "ge": " >= ", "ne": " ≠ ",
    "leq": " <= ", "geq": " >= ", "in": " ∈ ", "sim": " ~ ", "approx": " ≈ ", "equiv": " ≡ ",
    "simeq": " ≃ ",
    "Rightarrow": " => ", "to": " → ", "mapsto": " ↦ ", "infty": "∞", "cdot": "·", "times": "×",
    "otimes": "⊗", "circ": "∘", "cap": "∩", "cup": "∪", "sum": "Σ", "prod": "Π", "int": "∫",
    "top": "T", "perp": "⊥", "langle": "⟨", "rangle": "⟩", "lceil": "⌈", "rceil": "⌉",
    "dots": "…", "ldots": "…", "cdots": "…", "pm": "±", "nabla": "∇", "partial": "∂",
    "max": "max", "min": "min", "sup": "sup", "inf": "inf", "exp": "exp ", "log": "log ",
    "ln": "ln ", "cos": "cos ", "sin": "sin ", "tan": "tan ", "dim": "dim ", "det": "det ",
    "quad": "  ", "qquad": "  ", "Vert": "‖", "vert": "|", "mid": " | ", "preceq": " ⪯ ",
    "succeq": " ⪰ ", "forall": "for all ", "exists": "there is ", "setminus": " \\ ", "ell": "ℓ",
    "colon": ":", "big": "", "Big": "", "bigl": "", "bigr": "", "Bigl": "", "Bigr": "", "bigg": "",
    "Bigg": "", "left": "", "right": "", "displaystyle": "", "limits": "", "star": "*",
    "ll": " << ", "gg": " >> ", "not": "not ", "subset": " ⊂ ", "mathrm": "", "wedge": "∧",
}  # fmt: skip
_ACCENTS = {"dot": "\u0307", "ddot": "\u0308", "tilde": "\u0303", "hat": "\u0302", "bar": "\u0304"}
_PLAIN = ("mathrm", "text", "operatorname", "mathcal", "mathbb", "mathbf", "rm", "boldsymbol")
_SUPERSCRIPT = {
    "T": "ᵀ", "-1": "⁻¹", "2": "²", "3": "³", "4": "⁴", "+": "⁺", "-": "⁻", "⊥": "^⊥",
    "1": "¹", "0": "⁰", "-T": "⁻ᵀ", "-2": "⁻²", "5": "⁵",
}  # fmt: skip
_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|[{}^_]|[^\\{}^_]")


def to_text(latex: str) -> str:
    r"""`latex` in Unicode: ``\|X\|\le\frac{a}{b}`` becomes ``‖X‖ <= a/b``."""
    tokens = _TOKEN.findall(latex)
    text, rest = _read(tokens, 0, None)
    assert rest == len(tokens)
    text = re.sub(r"\s+", " ", text).strip()
    text = re.sub(r"\s+([,;.)\]])", r"\1", text)
    return re.sub(r"([(\[])\s+", r"\1", text)


def _group(tokens: list[str], k: int) -> tuple[str, int]:
    """The argument that begins at token k: a braced group, or one token."""
    while k < len(tokens) and tokens[k].isspace():
        k += 1
    if k >= len(tokens):
        return "", k
    if tokens[k] == "{":
        return _read(tokens, k + 1, "}")
    return _read(tokens[: k + 1], k, None) if tokens[k][0] != "\\" else _command(tokens, k)


def _read(tokens: list[str], k: int, end: str | None) -> tuple[str, int]:
    out: list[str] = []
    while k < len(tokens):
        token = tokens[k]
        if token == end:
            return "".join(out), k + 1
        if token == "{":
            part, k = _read(tokens, k + 1, "}")
            out.append(part)
        elif token in "^_":
            part, k = _group(tokens, k + 1)
            out.append(_raised(part.strip()) if token == "^" else _lowered(part.strip()))
        elif token[0] == "\\":
            part, k = _command(tokens, k)
            out.append(part)
        else:
            out.append(" " if token.isspace() else " = " if token == "=" else token)
            k += 1
    return "".join(out), k


def _command(tokens: list[str], k: int) -> tuple[str, int]:
    name = tokens[k][1:]
    if name in ("frac", "tfrac", "dfrac"):
        above, k = _group(tokens, k + 1)
        below, k = _group(tokens, k)
        return f"{_wrapped(above)}/{_wrapped(below)}", k
    if name == "sqrt":
        inside, k = _group(tokens, k + 1)
        return (f"√{inside}" if len(inside) == 1 else f"sqrt({inside})"), k
    if name in _ACCENTS:
        inside, k = _group(tokens, k + 1)
        return inside + _ACCENTS[name], k
    if name in _PLAIN:
        inside, k = _group(tokens, k + 1)
        return inside, k
    if name in _SYMBOLS:
        return _SYMBOLS[name], k + 1
    return {"|": "‖", "{": "{", "}": "}", ",": " ", ";": " ", ":": " ", "!": "", " ": " "}.get(
        name, tokens[k]
    ), k + 1


def _wrapped(part: str) -> str:
    part = part.strip()
    bare = part.replace(" ", "")
    inner = bare[1:-1]
    closed = bare[:1] == bare[-1:] == "‖" and "‖" not in inner
    simple = re.fullmatch(r"[\w.²³⁰⁻¹ᵀ∞∇√]*", bare) is not None
    return part if simple or closed else f"({part})"


def _raised(part: str) -> str:
    if part in _SUPERSCRIPT:
        return _SUPERSCRIPT[part]
    return f"^{part}" if len(part) == 1 else f"^({part})"


def _lowered(part: str) -> str:
    simple = re.fullmatch(r"\w+|[⊥∞*]|\w[+\-]\w", part) is not None
    return f"_{part}" if simple else f"_({part})"
