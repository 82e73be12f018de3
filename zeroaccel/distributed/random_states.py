"""This rank's random states, to be kept and set again."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy
import torch


def random_states(device: torch.device) -> dict[str, Any]:
    """States of `random`, NumPy, PyTorch's CPU generator, and that of the device.

    Args:
        device: this rank's.
    """
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": numpy.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state()
    return states


def set_random_states(states: Mapping[str, Any], device: torch.device) -> None:
    """Sets what `random_states` gave; a kind of device that this run does not have is left out."""
    random.setstate(states["python"])
    numpy.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if device.type in states:
        torch.get_device_module(device).set_rng_state(states[device.type])
