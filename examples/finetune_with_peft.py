"""Fine-tune a language model with PEFT and well-conditioned adapters, without internet.

A small Llama is trained on Python's help about statements, character by character, then frozen and
adapted to its help about types. Adapters of rank 4 are trained, saved, loaded and merged.

    pip install "lrmanifold[integration]"
    python examples/finetune_with_peft.py
"""

from __future__ import annotations

import copy
import tempfile
import time
from pydoc_data.topics import topics

import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import lrmanifold as lrm
from lrmanifold.interop.peft import LowRankConfig

CONTEXT, BATCH = 64, 8


def text(*names: str) -> str:
    """Sections of the help that every Python has."""
    return "".join(topics[name] for name in names if name in topics)


def as_numbers(words: str, index: dict[str, int]) -> torch.Tensor:
    """Characters as numbers; those that the base never saw are 0."""
    return torch.tensor([index.get(c, 0) for c in words])


def loss_on(model: torch.nn.Module, data: torch.Tensor) -> float:
    """Loss a character on the last 4096 of a text, which no training sees."""
    windows = data[-4096:].view(-1, CONTEXT)
    with torch.no_grad():
        return float(model(windows, labels=windows).loss)


def train(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, data: torch.Tensor, steps: int
) -> None:
    """Steps on random windows, the rate going to zero."""
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    for _ in range(steps):
        starts = torch.randint(len(data) - 4096 - CONTEXT, (BATCH, 1))
        windows = data[starts + torch.arange(CONTEXT)]
        loss = model(windows, labels=windows).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def main() -> None:
    """Pre-train, adapt, save, load, merge; print losses and times."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # faster than two for a model of this size
    start = time.perf_counter()
    old, new = (
        text("compound", "execmodel", "import"),
        text("types", "specialnames", "typesmapping"),
    )
    index = {c: i for i, c in enumerate(sorted(set(old)))}
    old_data, new_data = as_numbers(old, index), as_numbers(new, index)

    config = LlamaConfig(
        vocab_size=len(index),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
    )
    base = LlamaForCausalLM(config)
    train(base, torch.optim.AdamW(base.parameters(), lr=3e-3), old_data, 1000)
    print(f"base, on its own text: {loss_on(base, old_data):.3f}")
    print(f"base, on the new text: {loss_on(base, new_data):.3f}")

    layers = ["q_proj", "v_proj", "up_proj", "down_proj"]
    adapter = LowRankConfig(r=4, tau=0.1, target_modules=layers)
    model = get_peft_model(copy.deepcopy(base), adapter)
    model.print_trainable_parameters()
    trained = [p for p in model.parameters() if p.requires_grad]
    # Only optimizers of lrmanifold keep the adapters' condition numbers at most 1 + tau.
    train(model, lrm.optim.CondLRAdam(trained, lr=1e-2), new_data, 500)
    print(f"adapted: {loss_on(model, new_data):.3f}")
    with model.disable_adapter():
        print(f"adapter switched off: {loss_on(model, new_data):.3f}")

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), folder)
    merged = loaded.merge_and_unload()
    print(f"saved, loaded and merged: {loss_on(merged, new_data):.3f}")
    print(f"{time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
