"""What the loop costs: zeroaccel and Accelerate against raw DeepSpeed, in one process, interleaved.

Every block times some steps of each contestant in turn, so that whatever else the machine does hits all of them. Where
a contestant's memory lies makes some hundredths; so there are several rounds, each in a process of its own, in which
the contestants are made in another order, and glibc keeps freed memory: by itself it gives it back or not as it comes,
and a contestant that gets new pages at every step needs a third more.
Usage: python benchmarks/loop.py [--stages 0 1 2 3] [--rounds 12] [--blocks 25] [--steps 10] [--hidden 256]
           [--device cpu|cuda]
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

BATCH = 16
KEEP_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**30)}  # bytes


def make_model(hidden: int) -> nn.Module:
    torch.manual_seed(0)
    layers = [layer for _ in range(4) for layer in (nn.Linear(hidden, hidden), nn.GELU(), nn.LayerNorm(hidden))]
    return nn.Sequential(*layers)


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4)


def config_of(stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
    }


def raw_deepspeed(stage: int, hidden: int) -> tuple[Any, Callable[[torch.Tensor], None]]:
    import deepspeed

    model = make_model(hidden)
    engine, *_ = deepspeed.initialize(model=model, optimizer=make_optimizer(model), config=config_of(stage))

    def step(x: torch.Tensor) -> None:
        engine.backward(engine(x).square().mean())
        engine.step()

    return engine, step


def with_library(name: str, stage: int, hidden: int, cpu: bool) -> tuple[Any, Callable[[torch.Tensor], None]]:
    """`zeroaccel` or `accelerate`: the same lines, another import."""
    library = __import__(name)
    # Accelerate leaves DeepSpeed out where it is told to stay on the CPU.
    options = {"cpu": cpu} if name == "zeroaccel" else {}
    accelerator = library.Accelerator(
        deepspeed_plugin=library.DeepSpeedPlugin(hf_ds_config=config_of(stage)), **options
    )
    model = make_model(hidden)
    model, optimizer = accelerator.prepare(model, make_optimizer(model))

    def step(x: torch.Tensor) -> None:
        accelerator.backward(model(x).square().mean())
        optimizer.step()
        optimizer.zero_grad()

    return model, step


def measure(stage: int, arguments: argparse.Namespace, number: int) -> dict[str, float]:
    """Milliseconds a step of raw DeepSpeed, and the other two as ratios to it; medians over one round's blocks."""
    cpu = arguments.device == "cpu"
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29541",
    }
    if cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
        torch.set_num_threads(1)
    makers: dict[str, Callable[[], Any]] = {
        "raw": lambda: raw_deepspeed(stage, arguments.hidden),
        "zeroaccel": lambda: with_library("zeroaccel", stage, arguments.hidden, cpu),
        "accelerate": lambda: with_library("accelerate", stage, arguments.hidden, cpu),
    }
    made = {name: makers[name]() for name in list(itertools.permutations(makers))[number % 6]}
    contestants = {name: made[name] for name in makers}
    device = contestants["raw"][0].device
    x = torch.randn(BATCH, arguments.hidden, device=device)
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for block in range(-3, arguments.blocks):  # the first three warm up
        order = sorted(contestants, key=lambda name: (list(contestants).index(name) + block) % len(contestants))
        for name in order:
            _, step = contestants[name]
            begin = time.perf_counter()
            for _ in range(arguments.steps):
                step(x)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if block >= 0:
                times[name].append((time.perf_counter() - begin) / arguments.steps * 1000)
    ratios = {
        name: statistics.median(own / raw for own, raw in zip(times[name], times["raw"], strict=True))
        for name in ("zeroaccel", "accelerate")
    }
    for engine, _ in contestants.values():
        engine.destroy()
    return {"raw ms": statistics.median(times["raw"]), **ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--blocks", type=int, default=25)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    os.environ |= KEEP_FREED_MEMORY  # of the processes to come
    print("| stage | raw DeepSpeed, ms a step | zeroaccel / raw | Accelerate / raw |\n|---|---|---|---|")
    for stage in arguments.stages:
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            rounds = pool.starmap(measure, [(stage, arguments, number) for number in range(arguments.rounds)], 1)
        result = {name: statistics.median(found[name] for found in rounds) for name in rounds[0]}
        print(
            f"| {stage} | {result['raw ms']:.2f} | {result['zeroaccel']:.3f} | {result['accelerate']:.3f} |", flush=True
        )


if __name__ == "__main__":
    main()
