"""Who we are: ranks and device, what the run was configured to, and where the accumulation stands."""

from zeroaccel.config.types import DistributedType
from zeroaccel.state.accelerator import AcceleratorState, get_active_deepspeed_plugin, is_initialized
from zeroaccel.state.gradients import GradientState
from zeroaccel.state.process import PartialState, best_device, do_nothing

__all__ = [
    "AcceleratorState",
    "DistributedType",
    "GradientState",
    "PartialState",
    "best_device",
    "do_nothing",
    "get_active_deepspeed_plugin",
    "is_initialized",
]
