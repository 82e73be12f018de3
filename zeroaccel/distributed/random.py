"""Seeds, and random states that all ranks share."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy
import torch
import torch.distributed

from zeroaccel.config.types import RNGType
from zeroaccel.distributed.objects import broadcast_object_list
from zeroaccel.errors import ConfigError
from zeroaccel.state import PartialState
from zeroaccel.state.meeting import meet


def set_seed(seed: int, device_specific: bool = False, deterministic: bool = False) -> None:
    """Seeds `random`, NumPy and PyTorch on every device.

    Args:
        seed: the seed.
        device_specific: add the rank, so that ranks draw different numbers.
        deterministic: make PyTorch use deterministic algorithms, and refuse where there is none.
    """
    if device_specific:
        seed += PartialState().process_index
    random.seed(seed)
    numpy.random.seed(seed % 2**32)  # NumPy takes 32 bits
    torch.manual_seed(seed)  # all devices
    if deterministic:
        torch.use_deterministic_algorithms(True)


def agreed(seed: int) -> int:
    """Rank 0's seed on every rank. Collective."""
    return int(broadcast_object_list([seed])[0])


def synchronize_rng_state(rng_type: RNGType | str | None = None, generator: torch.Generator | None = None) -> None:
    """Sets a random state on all ranks to that of rank 0. Collective.

    Args:
        rng_type: "torch" for PyTorch's CPU generator, a device type such as "cuda" for that of the current
            device, or "generator" for `generator`.
        generator: what "generator" means.

    Raises:
        ConfigError: the type is unknown, the device is not there, or `generator` is missing.
    """
    read, write = _access(rng_type, generator)
    state = PartialState()
    if state.num_processes == 1:
        return
    meet(state, f"synchronize_rng_state({rng_type!s})")
    sent = read().to("cpu" if state.backend == "gloo" else state.device)
    torch.distributed.broadcast(sent, src=0)
    write(sent.cpu())


def _access(
    rng_type: RNGType | str | None, generator: torch.Generator | None
) -> tuple[Callable[[], torch.Tensor], Callable[[torch.Tensor], object]]:
    """How to read and write a random state."""
    if rng_type not in RNGType:
        raise ConfigError(f"rng_type {rng_type!r} is unknown: write one of {', '.join(RNGType.list())}")
    kind = RNGType(rng_type)
    if kind is RNGType.TORCH:
        return torch.get_rng_state, torch.set_rng_state
    if kind is RNGType.GENERATOR:
        if generator is None:
            raise ConfigError("rng_type 'generator' needs a generator: pass `generator=torch.Generator()`")
        return generator.get_state, generator.set_state
    device = getattr(torch, kind.value, None)
    if device is None or not device.is_available():
        raise ConfigError(f"rng_type {kind.value!r} is for a device that this machine does not have: leave it out")
    return device.get_rng_state, device.set_rng_state


def synchronize_rng_states(rng_types: Sequence[str | RNGType], generator: torch.Generator | None = None) -> None:
    """`synchronize_rng_state` for each type."""
    for rng_type in rng_types:
        synchronize_rng_state(rng_type, generator=generator)
