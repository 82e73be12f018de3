"""Gathering what a metric is computed from: each sample of the dataset once."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed

from zeroaccel.distributed.collectives import gather
from zeroaccel.distributed.nested import is_torch_tensor, leaves, recursively_apply
from zeroaccel.distributed.objects import gather_object
from zeroaccel.logging import library_logger
from zeroaccel.state import GradientState, PartialState

logger = library_logger(__name__)


def gather_for_metrics(input_data: Any, gradient_state: GradientState, use_gather_object: bool = False) -> Any:
    """`gather`, or `gather_object`, without the samples that were repeated to fill the loader's last batch.

    Args:
        input_data: nested lists, tuples and mappings of tensors whose first dimension is the sample; or a list
            with one object a sample.
        gradient_state: knows whether the active loader is at its end.
        use_gather_object: gather tensors as objects, too, for example where their shapes differ.

    Returns:
        What the ranks gave, in order of rank; in the loader's last batch cut to its real samples. Uncut, with a
        message in the log, where the loader cannot know them (a source of unknown length read by several workers).
    """
    state = PartialState()
    as_objects = use_gather_object or _anyone(_has_objects(input_data), state)
    gathered = gather_object(input_data) if as_objects else gather(input_data)
    if state.num_processes == 1 or not gradient_state.end_of_dataloader:
        return gathered
    real = gradient_state.remainder
    if real == -1:
        logger.info("the loader cannot know how many samples of its last batch are real: cut the result yourself")
        return gathered
    if real == 0:
        return gathered
    if as_objects:
        return gathered[:real]
    return recursively_apply(lambda tensor: tensor[:real], gathered)


def _has_objects(data: Any) -> bool:
    """Whether this cannot be gathered as tensors. A list may be empty on one rank and hold objects on another."""
    found = list(leaves(data))
    return not found or not all(is_torch_tensor(leaf) for leaf in found)


def _anyone(here: bool, state: PartialState) -> bool:
    """Whether it is so on any rank: ranks that took different ways would wait for each other for ever."""
    if state.num_processes == 1:
        return here
    flag = torch.tensor(here, dtype=torch.int32, device=state.device)
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
    return bool(flag.item())
