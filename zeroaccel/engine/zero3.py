"""Stage 3 around the engine: models born partitioned, the hand-shake with transformers, leaf modules."""

from __future__ import annotations

import copy
import importlib.util
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from zeroaccel.engine import ops
from zeroaccel.errors import ConfigError, UsageError
from zeroaccel.state import AcceleratorState

if TYPE_CHECKING:
    from zeroaccel.config.plugin import DeepSpeedPlugin


class _Announced:
    """A plugin's config as transformers asks for it: as it is now, with the numbers that `zero.Init` wants."""

    def __init__(self, plugin: DeepSpeedPlugin) -> None:
        self._plugin = plugin

    @property
    def config(self) -> dict[str, Any]:
        """The DeepSpeed config."""
        return _birth_config(self._plugin)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._plugin.hf_ds_config, name)  # is_zero3, get_value, ...


_announced: weakref.ref[_Announced] | None = None


def announce(plugin: DeepSpeedPlugin) -> object | None:
    """Tells transformers to build models partitioned, or not to, as the plugin says.

    It works whether or not Accelerate is installed, which transformers' own `HfDeepSpeedConfig` asks for.

    Returns:
        What the plugin has to keep alive as long as this shall hold; None: models are built whole.
    """
    wanted = plugin.zero3_init_flag and plugin.hf_ds_config.is_zero3()
    return _tell(_Announced(plugin) if wanted and importlib.util.find_spec("transformers") else None)


def _tell(announced: _Announced | None) -> _Announced | None:
    global _announced
    _announced = None if announced is None else weakref.ref(announced)
    if announced is None and "transformers" not in sys.modules:  # then nothing was ever told
        return None
    from transformers.integrations import deepspeed as theirs

    if announced is None:
        theirs.unset_hf_deepspeed_config()
        return None
    from zeroaccel.engine import zero_init

    zero_init.mend()  # transformers enters DeepSpeed's context by itself
    if announced.get_value("zero_optimization.offload_param.device") == "nvme":
        ops.build(ops.needed(announced.config))
    theirs.set_hf_deepspeed_config(announced)
    return announced


@contextmanager
def births(plugin: DeepSpeedPlugin) -> Iterator[None]:
    """Inside the block models, those of transformers too, are built partitioned, or whole, as the plugin says.

    Raises:
        UsageError: no `Accelerator` has been made with this plugin yet.
        DistributedError: on all ranks, where they build different models.
    """
    before = None if _announced is None else _announced()
    here = announce(plugin)
    try:
        if plugin.zero3_init_flag and plugin.hf_ds_config.is_zero3():
            _refuse_early(plugin)
            from zeroaccel.engine import birth  # which loads DeepSpeed

            with birth.partitioned(_birth_config(plugin)):
                yield
        else:
            loaded: Any = sys.modules.get("zeroaccel.engine.birth")  # else there is nothing to suspend
            with nullcontext() if loaded is None else loaded.suspended():
                yield
    finally:
        del here
        _tell(before)


def _refuse_early(plugin: DeepSpeedPlugin) -> None:
    plugins = AcceleratorState._shared_state.get("deepspeed_plugins")
    if not any(plugin is known for known in (plugins.values() if isinstance(plugins, dict) else [plugins])):
        raise UsageError(
            "models can be built partitioned once there is an Accelerator, which knows ranks and precision: make"
            " `Accelerator(deepspeed_plugin=plugin)` first"
        )


def _birth_config(plugin: DeepSpeedPlugin) -> dict[str, Any]:
    """The config for `zero.Init`, which wants batch sizes that only `prepare()` knows and that do not matter to it."""
    config = copy.deepcopy(plugin.deepspeed_config)
    for key in ("gradient_accumulation_steps", "train_micro_batch_size_per_gpu"):
        if config.get(key, "auto") == "auto":
            config[key] = 1
    config.pop("train_batch_size", None)
    return config


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
