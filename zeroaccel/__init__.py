"""A plain PyTorch loop on DeepSpeed ZeRO. Importing this loads neither torch nor DeepSpeed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zeroaccel.lazy import reexport

__version__ = "0.1.0"

if TYPE_CHECKING:
    from zeroaccel.accelerator import Accelerator as Accelerator
    from zeroaccel.checkpoint.load_weights import load_checkpoint_in_model as load_checkpoint_in_model
    from zeroaccel.config.options import AutocastKwargs as AutocastKwargs
    from zeroaccel.config.options import DataLoaderConfiguration as DataLoaderConfiguration
    from zeroaccel.config.options import DistributedDataParallelKwargs as DistributedDataParallelKwargs
    from zeroaccel.config.options import GradScalerKwargs as GradScalerKwargs
    from zeroaccel.config.options import InitProcessGroupKwargs as InitProcessGroupKwargs
    from zeroaccel.config.options import ProfileKwargs as ProfileKwargs
    from zeroaccel.config.packages import is_rich_available as is_rich_available
    from zeroaccel.config.plugin import DeepSpeedPlugin as DeepSpeedPlugin
    from zeroaccel.config.types import DDPCommunicationHookType as DDPCommunicationHookType
    from zeroaccel.config.types import DistributedType as DistributedType
    from zeroaccel.data_loader import skip_first_batches as skip_first_batches
    from zeroaccel.distributed.random import synchronize_rng_states as synchronize_rng_states
    from zeroaccel.engine.memory import find_executable_batch_size as find_executable_batch_size
    from zeroaccel.engine.placement import init_empty_weights as init_empty_weights
    from zeroaccel.engine.placement import init_on_device as init_on_device
    from zeroaccel.launchers import debug_launcher as debug_launcher
    from zeroaccel.launchers import notebook_launcher as notebook_launcher
    from zeroaccel.state import PartialState as PartialState

__getattr__, __all__ = reexport(
    __name__,
    {
        "zeroaccel.accelerator": ["Accelerator"],
        "zeroaccel.checkpoint.load_weights": ["load_checkpoint_in_model"],
        "zeroaccel.config.options": [
            "AutocastKwargs",
            "DataLoaderConfiguration",
            "DistributedDataParallelKwargs",
            "GradScalerKwargs",
            "InitProcessGroupKwargs",
            "ProfileKwargs",
        ],
        "zeroaccel.config.packages": ["is_rich_available"],
        "zeroaccel.config.plugin": ["DeepSpeedPlugin"],
        "zeroaccel.config.types": ["DDPCommunicationHookType", "DistributedType"],
        "zeroaccel.data_loader": ["skip_first_batches"],
        "zeroaccel.distributed.random": ["synchronize_rng_states"],
        "zeroaccel.engine.memory": ["find_executable_batch_size"],
        "zeroaccel.engine.placement": ["init_empty_weights", "init_on_device"],
        "zeroaccel.launchers": ["debug_launcher", "notebook_launcher"],
        "zeroaccel.refused": [
            "FullyShardedDataParallelPlugin",
            "ParallelismConfig",
            "cpu_offload",
            "cpu_offload_with_hook",
            "disk_offload",
            "dispatch_model",
            "infer_auto_device_map",
            "load_checkpoint_and_dispatch",
            "prepare_pippy",
        ],
        "zeroaccel.state": ["PartialState"],
    },
    submodules=[
        "accelerator",
        "big_modeling",
        "checkpoint",
        "checkpointing",
        "commands",
        "data_loader",
        "hooks",
        "launchers",
        "local_sgd",
        "logging",
        "optimizer",
        "parallelism_config",
        "scheduler",
        "state",
        "tracking",
        "utils",
    ],
)
