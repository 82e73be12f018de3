"""What each rank of `zeroaccel test` runs: small trainings beside the same ones in plain PyTorch."""

from __future__ import annotations

import copy
import functools
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from zeroaccel.accelerator import Accelerator
from zeroaccel.commands.test import PASSED
from zeroaccel.config import environment
from zeroaccel.config.env_patch import patch_environment
from zeroaccel.config.plugin import DeepSpeedPlugin
from zeroaccel.engine.optimizer import DummyOptim
from zeroaccel.engine.scheduler import DummyScheduler
from zeroaccel.engine.zero3 import GatheredParameters
from zeroaccel.state import AcceleratorState, GradientState, PartialState

FEATURES, CLASSES = 16, 4
MICRO_BATCH, ACCUMULATION, STEPS = 4, 2, 4
LEARNING_RATE, CLIPPING = 1e-2, 0.5
OF_THE_LAUNCH = {"cpu", "debug", "cpu_affinity", "ranks_from"}  # what says how ranks run, not how they train
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
# How far weights may be from plain PyTorch's, as part of the way that they went, and gradient norms as part of those.
TOLERANCES = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.1}


@dataclass
class Training:
    """What a training was, and what it came to.

    Attributes:
        batch: samples of a micro-batch on all ranks.
        accumulation: micro-batches of a step.
        clipping: largest norm of the gradients; 0: not clipped.
        dtype: of the forward pass.
        losses: of every step, over all ranks.
        norms: of the gradients, before clipping.
        skipped: which steps an overflow in fp16 left out.
        weights: the model's at the end.
    """

    batch: int
    accumulation: int
    clipping: float
    dtype: torch.dtype
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    skipped: list[bool] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)


def make_model() -> nn.Sequential:
    """The same at every call, on every rank."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(FEATURES, 32), nn.Tanh(), nn.LayerNorm(32), nn.Linear(32, CLASSES))


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """A large `eps`: gradients near 0 must not decide, of which rounding is most."""
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, eps=1e-3)


def make_dataset(window: int) -> TensorDataset:
    """Each of the steps sees the same `window` samples, so that the loss falls."""
    x = torch.randn(window, FEATURES, generator=torch.Generator().manual_seed(1))
    y = x[:, :CLASSES].argmax(dim=1)
    return TensorDataset(x.repeat(STEPS, 1), y.repeat(STEPS))


def loss_of(model: nn.Module, x: torch.Tensor, y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Mean over the batch, in fp32."""
    return nn.functional.cross_entropy(model(x.to(dtype)).float(), y)


def train(accelerator: Accelerator, clip: bool) -> Training:
    """Trains as the accelerator is configured.

    Args:
        accelerator: with a DeepSpeed plugin.
        clip: call `clip_grad_norm_`.
    """
    assert accelerator.deepspeed_plugin is not None
    asked, ranks = accelerator.deepspeed_plugin.deepspeed_config, accelerator.num_processes
    micro, accumulation = sizes(asked, ranks, accelerator.gradient_accumulation_steps)
    model, loader = make_model(), DataLoader(make_dataset(micro * accumulation * ranks), batch_size=micro)
    optimizer: Any = DummyOptim(model.parameters(), lr=LEARNING_RATE) if "optimizer" in asked else make_optimizer(model)
    scheduler = [DummyScheduler(optimizer, total_num_steps=STEPS * ranks)] if "scheduler" in asked else []
    engine, optimizer, loader, *scheduler = accelerator.prepare(model, optimizer, loader, *scheduler)
    config = accelerator.deepspeed_config or {}
    clipping = CLIPPING if clip else float(config.get("gradient_clipping", 0.0))
    dtype = DTYPES[accelerator.mixed_precision]
    training = Training(micro * ranks, accelerator.gradient_accumulation_steps, clipping, dtype)
    losses = []
    for x, y in loader:
        with accelerator.accumulate(engine):
            loss = loss_of(engine, x, y, dtype)
            losses.append(float(accelerator.reduce(loss.detach(), "mean")))
            accelerator.backward(loss)
            if clip and accelerator.sync_gradients:
                training.norms.append(float(accelerator.clip_grad_norm_(engine.parameters(), clipping)))
            optimizer.step()
            for each in scheduler:
                each.step()
            if accelerator.sync_gradients:
                training.skipped.append(accelerator.optimizer_step_was_skipped)
            optimizer.zero_grad()
    training.losses = [math.fsum(window) / len(window) for window in _windows(losses, training.accumulation)]
    parameters = dict(accelerator.unwrap_model(engine).named_parameters())
    with GatheredParameters(list(parameters.values())):
        training.weights = {name: each.detach().float().cpu().clone() for name, each in parameters.items()}
    accelerator.free_memory(engine, optimizer, loader)
    return training


def sizes(config: dict[str, Any], ranks: int, accumulation: int) -> tuple[int, int]:
    """Micro-batch and accumulation that agree with a DeepSpeed config; `accumulation` holds where it leaves it open."""
    micro, total, steps = (
        None if config.get(key, "auto") == "auto" else int(config[key])
        for key in ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps")
    )
    if total is None:
        return micro or MICRO_BATCH, steps or accumulation
    if micro is None:
        return total // (ranks * (steps or accumulation)), steps or accumulation
    return micro, steps or total // (ranks * micro)


def _windows(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def train_in_plain_pytorch(training: Training, device: torch.device) -> Training:
    """The same training in this process alone, with fp32 weights and a copy that computes the gradients."""
    plain = Training(training.batch, training.accumulation, training.clipping, training.dtype)
    model = make_model().to(device)
    computing = copy.deepcopy(model).to(plain.dtype)
    optimizer = make_optimizer(model)
    batches = list(DataLoader(make_dataset(plain.batch * plain.accumulation), batch_size=plain.batch))
    for window, skipped in zip(_windows(batches, plain.accumulation), training.skipped, strict=True):
        losses = [loss_of(computing, x.to(device), y.to(device), plain.dtype) for x, y in window]
        mean = torch.stack(losses).mean()
        mean.backward()  # type: ignore[no-untyped-call]
        plain.losses.append(mean.item())
        for weight, computed in zip(model.parameters(), computing.parameters(), strict=True):
            weight.grad = None if computed.grad is None else computed.grad.float()
            computed.grad = None
        norm = nn.utils.clip_grad_norm_(model.parameters(), plain.clipping or math.inf)
        plain.norms.append(float(norm))
        if not skipped:
            optimizer.step()
        with torch.no_grad():
            for weight, computed in zip(model.parameters(), computing.parameters(), strict=True):
                computed.copy_(weight)
    plain.weights = {name: each.detach().cpu() for name, each in model.named_parameters()}
    return plain


# --- checks -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """What a check found: words for the table, and what is wrong, if anything."""

    told: str
    problem: str | None = None


def _relative(one: list[float], other: list[float]) -> float:
    """Largest difference of two lists as part of the second one's values; infinite where there is no number."""
    if len(one) != len(other) or not all(map(math.isfinite, one)):
        return math.inf
    return max((abs(a - b) / (abs(b) or 1.0) for a, b in zip(one, other, strict=True)), default=0.0)


def compare(training: Training, plain: Training) -> Found:
    """Whether a training came to what plain PyTorch came to."""
    start = dict(make_model().named_parameters())
    way = max(float((weight - start[name].detach()).abs().max()) for name, weight in plain.weights.items())
    off = max(float((training.weights[name] - weight).abs().max()) for name, weight in plain.weights.items())
    told = f"loss {training.losses[0]:.4f} -> {training.losses[-1]:.4f}, weights differ by {off:.0e}"
    tolerance = TOLERANCES[training.dtype]
    problems = []
    if not off <= tolerance * way:
        problems.append(f"weights differ by {off:.1e}, after a way of {way:.1e}")
    if not _relative(training.losses, plain.losses) <= tolerance:
        problems.append(f"losses are {_listed(training.losses)}, in plain PyTorch {_listed(plain.losses)}")
    if training.norms and not _relative(training.norms, plain.norms) <= tolerance:
        problems.append(f"gradient norms are {_listed(training.norms)}, in plain PyTorch {_listed(plain.norms)}")
    return Found(told, "; ".join(problems) or None)


def _listed(numbers: list[float]) -> str:
    return " ".join(f"{number:.4g}" for number in numbers)


def check_stage(stage: int) -> Found:
    """One stage in fp32, with accumulation and clipping."""
    forget()
    plugin = DeepSpeedPlugin(zero_stage=stage)
    accelerator = Accelerator(gradient_accumulation_steps=ACCUMULATION, deepspeed_plugin=plugin)
    training = train(accelerator, clip=True)
    return compare(training, train_in_plain_pytorch(training, accelerator.device))


def check_configuration() -> Found:
    """What the launcher says. An optimizer of the DeepSpeed config has its own numbers: then the loss must fall."""
    forget()
    plugin, ranks = DeepSpeedPlugin(), PartialState().num_processes
    _, accumulation = sizes(plugin.deepspeed_config, ranks, accumulation=1)
    accelerator = Accelerator(gradient_accumulation_steps=accumulation, deepspeed_plugin=plugin)
    own_optimizer = "optimizer" in plugin.deepspeed_config
    training = train(accelerator, clip=False)
    if not own_optimizer:
        return compare(training, train_in_plain_pytorch(training, accelerator.device))
    first, last = training.losses[0], training.losses[-1]
    problem = None if last <= first else f"losses are {_listed(training.losses)}"  # a NaN is not less, either
    return Found(f"loss {first:.4f} -> {last:.4f}, with the optimizer of the DeepSpeed config", problem)


def check_communication() -> Found:
    """Every rank adds to a sum that all of them get."""
    forget()
    state, amount = PartialState(), 2**18
    numbers = torch.full((amount,), float(state.process_index + 1), device=state.device)
    if state.num_processes > 1:
        torch.distributed.all_reduce(numbers)
    total = state.num_processes * (state.num_processes + 1) // 2
    wrong = int((numbers != total).sum())
    backend = torch.distributed.get_backend() if state.num_processes > 1 else "alone"
    return Found(
        f"{state.num_processes} on {state.device.type}, {backend}", f"{wrong} sums are wrong" if wrong else None
    )


def check_loader() -> Found:
    """Every sample of a prepared loader reaches one rank."""
    forget()
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(zero_stage=0))
    amount = 3 * accelerator.num_processes + 1
    loader = accelerator.prepare_data_loader(DataLoader(range(amount), batch_size=1))  # type: ignore[arg-type]
    seen = sorted(number for batch in loader for number in accelerator.gather_for_metrics(batch).tolist())
    return Found(f"{amount} samples", None if seen == list(range(amount)) else f"samples {seen} came")


def forget() -> None:
    """What a new process has: no state of the library; the process group stays."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


# --- the table --------------------------------------------------------------------------------------------------


def checks(configured: dict[str, str]) -> dict[str, Callable[[], Found]]:
    """Name in the table -> check.

    Args:
        configured: variables by which the launcher configures the training.
    """

    def as_configured() -> Found:
        with patch_environment(**configured):
            return check_configuration()

    table: dict[str, Callable[[], Found]] = {"ranks": check_communication, "data": check_loader}
    for stage in range(4):
        table[f"ZeRO stage {stage}"] = functools.partial(check_stage, stage)
    if configured:
        table["as configured"] = as_configured
    return table


def run_checks(table: dict[str, Callable[[], Found]]) -> bool:
    """Runs the checks and prints a line about each on rank 0; whether all ranks found all in order."""
    passed = True
    for name, check in table.items():
        _print(f"  {name:<14}", end="")
        start = time.monotonic()
        try:
            found = check()
        except Exception:
            _print(f" {_sign(False)}")
            raise
        problems = _of_all_ranks(found.problem)
        sign = _sign(not problems)
        _print(f" {sign}  {found.told}  ({time.monotonic() - start:.1f} s)")
        for rank, problem in problems.items():
            _print(f"      rank {rank}: {problem}")
        passed = passed and not problems
    return passed


def _of_all_ranks(problem: str | None) -> dict[int, str]:
    problems = [problem]
    if PartialState().num_processes > 1:
        problems = [None] * PartialState().num_processes
        torch.distributed.all_gather_object(problems, problem)
    return {rank: each for rank, each in enumerate(problems) if each is not None}


def _sign(good: bool) -> str:
    unicode = "utf" in (sys.stdout.encoding or "").lower()
    return ("✓" if good else "✗") if unicode else ("ok" if good else "WRONG")


def _print(text: str, end: str = "\n") -> None:
    if PartialState().is_main_process:
        print(text, end=end, flush=True)


def take_configuration() -> dict[str, str]:
    """Takes what configures a training out of the environment, so that the stages are trained without it.

    Returns:
        it; nothing, if it does not ask for DeepSpeed.
    """
    asked = environment.flag("USE_DEEPSPEED")
    names = environment.exports(dict.fromkeys(set(environment.FIELDS) - OF_THE_LAUNCH, ""))
    taken = {name: os.environ.pop(name) for name in names if name in os.environ}
    for name in environment.exports({"deepspeed_moe_layer_cls_names": ""}):
        taken.pop(name, None)  # the small model has no such layers
    return taken if asked else {}


def main(verdict: str) -> None:
    """Runs all checks; rank 0 writes `PASSED` or "failed" to the file `verdict`."""
    configured = take_configuration()
    passed = run_checks(checks(configured))
    _print("All agree with plain PyTorch." if passed else "Some do not agree with plain PyTorch.")
    if PartialState().is_main_process:
        Path(verdict).write_text(PASSED if passed else "failed")
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
