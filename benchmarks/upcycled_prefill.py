"""Prefill time and cache of a Llama and of YOCOs made of it, in the same engine: the weights do not matter."""

import json
from pathlib import Path
from typing import Any

import torch
from inference import clear, sync
from runs import device_name

from yoco_megatron.hf.modeling_yoco import YocoForCausalLM
from yoco_megatron.inference.engine import Engine
from yoco_megatron.upcycling.mapping import student_config
from yoco_megatron.upcycling.teacher import Teacher, open_teacher

ROUNDS = 3  # the first one warms up


def measure(teacher: Path, students: dict[str, dict[str, Any]], lengths: list[int], file: Path, cuda: bool) -> None:
    """Add to `file`, for the teacher and each student, {length: {"prefill seconds", "cache bytes"}} in bf16.

    What is there is kept. One sequence of random tokens; the fastest round counts.

    Args:
        students: by name, the arguments of `student_config`.
    """
    found = json.loads(file.read_text()) if file.exists() else {}
    device, opened = torch.device("cuda" if cuda else "cpu"), open_teacher(str(teacher))
    for name, fields in {"teacher": None, **students}.items():
        known = found.setdefault(name, {})
        if all(str(length) in known for length in lengths):
            continue
        model = build(opened, fields).to(device, torch.bfloat16).eval()
        for length in lengths:
            seconds, size = prefill(model, length, reserve=fields is None, device=device)
            known[str(length)] = {"prefill seconds": seconds, "cache bytes": size}
            print(f"{name}, {length:,} tokens: prefill {seconds:.4g} s, cache {size:,} bytes", flush=True)
        found["device"] = device_name(1) if cuda else "CPU"
        file.write_text(json.dumps(found, indent=1) + "\n")
        del model
        clear(cuda)


def build(teacher: Teacher, fields: dict[str, Any] | None) -> torch.nn.Module:
    """With random weights."""
    if fields is not None:
        return YocoForCausalLM(student_config(teacher, **fields))
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(teacher.config)


def prefill(model: Any, length: int, reserve: bool, device: torch.device) -> tuple[float, int]:
    """(seconds, bytes of the cache then)."""
    ids = torch.randint(0, model.config.vocab_size, (1, length), device=device)
    times, size = [], 0
    for _ in range(ROUNDS):
        engine = Engine(model, length, reserve=reserve)
        started = sync(device)
        engine.prefill(ids)
        times.append(sync(device) - started)
        size = engine.nbytes()
    return min(times), size
