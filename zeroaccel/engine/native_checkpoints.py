"""`engine.save_checkpoint` and `engine.load_checkpoint`: DeepSpeed's own, which must not lose anything silently.

What DeepSpeed 0.19.8 gets wrong without a word is put right here, or refused.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from zeroaccel.distributed.objects import all_objects
from zeroaccel.engine.masters import Share
from zeroaccel.errors import CheckpointError, UnsupportedError, UsageError

_INSTEAD = "use accelerator.save_state() and accelerator.load_state()"


def save(
    engine: Any, share: Callable[[Any], Share], native: Callable[..., Any], *arguments: Any, **options: Any
) -> Any:
    """In place of the engine's `save_checkpoint`.

    Args:
        engine: the engine.
        share: gives what this rank holds of it.
        native: its own method.
        arguments, options: of that.

    Raises:
        UsageError: an accumulation window is open, whose gradients would be lost.
    """
    if waiting := share(engine).open_micro_batches():
        raise UsageError(
            f"engine.save_checkpoint() would lose the gradients of {waiting} micro-batches that wait for their"
            " optimizer step: save where accelerator.sync_gradients is True, after optimizer.step(), or use"
            " accelerator.save_state(), which keeps them"
        )
    return native(*arguments, **options)


def load(
    engine: Any,
    share: Callable[[Any], Share],
    native: Callable[..., Any],
    load_dir: str | os.PathLike[str],
    tag: str | None = None,
    load_module_strict: bool = True,
    load_optimizer_states: bool = True,
    load_lr_scheduler_states: bool = True,
    load_module_only: bool = False,
    custom_load_fn: Callable[..., Any] | None = None,
) -> tuple[str | None, dict[str, Any] | None]:
    """In place of the engine's `load_checkpoint`, with its arguments and result. Collective.

    Raises:
        UnsupportedError: DeepSpeed would load something else than was saved.
        CheckpointError: it has, because the ranks' files are of different steps or the configuration has changed.
    """
    folder = os.fspath(load_dir)
    _refuse_what_goes_wrong(engine, folder, tag, load_optimizer_states, load_module_only)
    share(engine).drop_gradients()
    optimizer = engine.optimizer
    scaler, clipping = getattr(optimizer, "loss_scaler", None), getattr(optimizer, "clip_grad", None)
    path, client_state = native(
        folder,
        tag,
        load_module_strict,
        load_optimizer_states,
        load_lr_scheduler_states,
        load_module_only,
        custom_load_fn,
    )
    if path is None:
        return path, client_state
    if clipping is not None:
        optimizer.clip_grad = clipping  # stages 1 and 2 take that of the checkpoint
    config = (client_state or {}).get("ds_config") or {}
    if scaler is not None and engine.fp16_enabled() and not (config.get("fp16") or {}).get("enabled"):
        optimizer.loss_scaler = scaler  # the checkpoint's is the constant 1 of a run in fp32
    if load_optimizer_states and not load_module_only:
        _check_order(engine, config, os.path.dirname(path))
        _check_ranks(engine, os.path.dirname(path))
    return path, client_state


def _refuse_what_goes_wrong(
    engine: Any, folder: str, tag: str | None, load_optimizer_states: bool, load_module_only: bool
) -> None:
    sharded = engine.zero_optimization_stage() == 3
    problem = None
    if engine.zero_nvme_offload_optimizer():
        problem = f"DeepSpeed loses step count and moments of an optimizer on NVMe: {_INSTEAD}"
    elif engine.load_universal_checkpoint():
        problem = _universal_problem(engine)
    elif sharded and load_module_only:
        problem = (
            "DeepSpeed loads nothing with load_module_only=True at stage 3: write load_optimizer_states=False,"
            " load_lr_scheduler_states=False instead"
        )
    elif sharded and not load_optimizer_states and tag is not None and tag != _latest(folder):
        problem = (
            f"without optimizer states DeepSpeed loads the tag that {os.path.join(folder, 'latest')} names"
            f" ({_latest(folder)}), not {tag}, at stage 3: `zeroaccel merge-weights {folder} OUTPUT --tag {tag}` and"
            " load_checkpoint_in_model do"
        )
    if problem is not None:
        raise UnsupportedError(f"engine.load_checkpoint({folder!r}): {problem}")


def _latest(folder: str) -> str | None:
    path = os.path.join(folder, "latest")
    if not os.path.isfile(path):
        return None
    with open(path, encoding="utf-8") as file:
        return file.read().strip()


def _universal_problem(engine: Any) -> str | None:
    """What of this run a universal checkpoint would leave as it is, or mix up."""
    names = [name for name, parameter in engine.module.named_parameters() if not parameter.requires_grad]
    names += [name for name, _ in engine.module.named_buffers()]
    if names and engine.zero_optimization():
        return f"a universal checkpoint does not bring back {', '.join(names[:4])} (frozen, or a buffer): {_INSTEAD}"
    if engine.zero_optimization_stage() != 3:
        return None
    if len(engine.basic_optimizer.param_groups) > 1:
        return f"a universal checkpoint gives all param groups the learning rate of the first one: {_INSTEAD}"
    if len(engine.optimizer.fp16_groups) > 1:
        return f"a universal checkpoint has the sub-groups of stage 3 count their steps together: {_INSTEAD}"
    return None


def _check_order(engine: Any, saved: dict[str, Any], folder: str) -> None:
    then = bool((saved.get("zero_optimization") or {}).get("round_robin_gradients", False))
    now = engine.zero_round_robin_gradients()
    if saved and engine.zero_optimization_stage() in (1, 2) and then != now:
        raise CheckpointError(
            f"{folder} was saved with round_robin_gradients={then} and is loaded with {now}, in which parameters lie in"
            f" another order: set round_robin_gradients to {str(then).lower()} in the DeepSpeed config"
        )


def _check_ranks(engine: Any, folder: str) -> None:
    """A save that was killed while it replaced an older one leaves files of both."""
    counted = {float(state["step"]) for state in engine.basic_optimizer.state.values() if "step" in state}
    found = all_objects((engine.global_steps, max(counted, default=None)), "engine.load_checkpoint()")
    engines, optimizers = ({one for one in steps if one is not None} for steps in zip(*found, strict=True))
    if len(engines) > 1 or len(optimizers) > 1:
        shown = ", ".join(f"{steps} on rank {rank}" for rank, steps in enumerate(found))
        raise CheckpointError(
            f"the ranks' files in {folder} are of different steps (engine's, optimizer's: {shown}), as a save that was"
            " killed leaves them: load an older checkpoint; accelerator.save_state() cannot be torn in this way"
        )
