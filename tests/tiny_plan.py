"""A plan of the robustness benchmark that is done in seconds, and how to write one."""

from __future__ import annotations

import copy
import json

START = {"lr": 0.1, "weight_decay": 0.0, "label_smoothing": 0.0}
TINY = {
    "title": "Tiny",
    "seeds": [0, 1],
    "reference": "dense",
    "network": {
        "data": "digits", "model": "mlp", "samples": 300, "exclude": ["fc3"],
        "ranks": {"fc1": 8, "fc2": 8},
    },
    "training": {"epochs": 2, "batch_size": 32},
    "search": {
        "trials": 4, "seeds": [100], "images": 20, "attacks": ["pgd"], "steps": 2,
        "robust_share": [0.5, 0.0],
    },
    "attack": {
        "eps": 0.06, "fgsm": [0.06], "pgd": [0.06], "transfer": [0.1], "images": 20, "steps": 2,
        "queries": 20, "worst_l2": [0.1], "condition_images": 3,
    },
    "axes": {
        "lr": {"factor": 2},
        "weight_decay": {"first": 0.001, "factor": 3},
        "label_smoothing": {"first": 0.1, "factor": 2, "below": 1},
        "finetune": {"factor": 3},
    },
    "family": [
        {"name": "dense", "kind": "dense", "start": START},
        {"name": "cut", "kind": "finetuned", "start": {**START, "finetune": 0.3}},
        {
            "name": "ours", "kind": "condlr", "tau": 0.1, "start": START,
            "ranks": {"fc1": 4, "fc2": 4},
        },
        {"name": "wild", "kind": "factors", "start": {**START, "lr": 1e9}},
    ],
    "hypothesis": [{"text": "Smaller is harder.", "better": ["ours"], "than": ["dense", "cut"]}],
}  # fmt: skip


def changed(**tables):
    found = copy.deepcopy(TINY)
    for name, change in tables.items():
        if isinstance(change, dict):
            found[name] = {**found.get(name, {}), **change}
        else:
            found[name] = change
    return found


# Where the question is who does the work, and not how well.
SMALL = changed(
    family=[f for f in TINY["family"] if f["name"] != "cut"],
    hypothesis=[{"text": "Smaller is harder.", "better": ["ours"], "than": ["dense"]}],
    search={"trials": 2, "robust_share": [0.5]},
    attack={"fgsm": [], "transfer": [], "worst_l2": [], "condition_images": 0},
)


def write(folder, raw):
    """A plan as a file, by the few kinds of value that plans have."""
    lines = []

    def line(key, value):
        text = {True: "true", False: "false"}.get(value) if isinstance(value, bool) else None
        if isinstance(value, dict):
            text = (
                "{ " + ", ".join(f"{json.dumps(k)} = {_word(v)}" for k, v in value.items()) + " }"
            )
        lines.append(f"{key} = {text or _word(value)}")

    tables = {k: v for k, v in raw.items() if isinstance(v, dict)}
    lists = {k: v for k, v in raw.items() if isinstance(v, list) and isinstance(v[0], dict)}
    for key, value in raw.items():
        if key not in tables and key not in lists:
            line(key, value)
    for name, table in tables.items():
        lines.append(f"[{name}]")
        for key, value in table.items():
            line(key, value)
    for name, entries in lists.items():
        for entry in entries:
            lines.append(f"[[{name}]]")
            for key, value in entry.items():
                line(key, value)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "plan.toml"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _word(value):
    if isinstance(value, list):
        return "[" + ", ".join(map(_word, value)) + "]"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(k)} = {_word(v)}" for k, v in value.items()) + " }"
    return json.dumps(value) if isinstance(value, str) else repr(value)
