"""Stage 3 around the engine: models born partitioned, the hand-shake with transformers, leaf modules."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from zeroaccel.config.document import HfDeepSpeedConfig
from zeroaccel.engine import ops
from zeroaccel.errors import ConfigError
from zeroaccel.state import AcceleratorState


def register_with_transformers(config: dict[str, Any], partition_at_birth: bool) -> object | None:
    """Tells transformers to build models partitioned (stage 3), or not to.

    Returns:
        The object that must stay alive as long as this shall hold, or None.
    """
    if not partition_at_birth:
        if "transformers" in sys.modules:  # else nothing was ever registered
            from transformers.integrations.deepspeed import unset_hf_deepspeed_config

            unset_hf_deepspeed_config()
        return None
    if importlib.util.find_spec("transformers") is None:
        return None
    from transformers.integrations.deepspeed import set_hf_deepspeed_config

    ops.build(ops.needed(config))  # parameters born on NVMe are written through async_io
    document = HfDeepSpeedConfig(_with_numbers(config))
    set_hf_deepspeed_config(document)
    return document


def _with_numbers(config: dict[str, Any]) -> dict[str, Any]:
    # zero.Init reads the config before prepare() knows these; they do not matter for partitioning.
    shown = dict(config)
    for key in ("gradient_accumulation_steps", "train_micro_batch_size_per_gpu"):
        if shown.get(key, "auto") == "auto":
            shown[key] = 1
    if shown.get("train_batch_size") == "auto":
        del shown["train_batch_size"]
    return shown


def set_leaf_modules(model: torch.nn.Module, class_names: list[str]) -> None:
    """Makes stage 3 gather the modules of these classes as a whole (mixtures of experts).

    Raises:
        ConfigError: the model has no module of such a class.
    """
    from deepspeed.utils import set_z3_leaf_modules

    classes = {type(module).__name__: type(module) for module in model.modules()}
    missing = [name for name in class_names if name not in classes]
    if missing:
        raise ConfigError(
            f"transformer_moe_cls_names names {', '.join(missing)}, which {type(model).__name__} does not contain;"
            f" it has {', '.join(sorted(classes))}"
        )
    set_z3_leaf_modules(model, [classes[name] for name in class_names])


@contextmanager
def GatheredParameters(
    params: Any, modifier_rank: int | None = None, fwd_module: torch.nn.Module | None = None, enabled: bool = True
) -> Iterator[None]:
    """Inside the block parameters that stage 3 has split are whole; does nothing below stage 3. Collective.

    Args:
        params: parameters.
        modifier_rank: rank whose changes all ranks keep; None: nobody changes them.
        fwd_module: module that the block runs, whose gathered parameters are looked after then.
        enabled: False does nothing.
    """
    plugin = AcceleratorState().deepspeed_plugin if AcceleratorState._shared_state else None
    if plugin is None or plugin.zero_stage != 3:
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters as gathered

    with gathered(params, modifier_rank=modifier_rank, fwd_module=fwd_module, enabled=enabled):
        yield
