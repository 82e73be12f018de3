"""Gathering what a metric is computed from: each sample of the dataset once."""

from __future__ import annotations

from typing import Any

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
    as_objects = use_gather_object or not all(is_torch_tensor(leaf) for leaf in leaves(input_data))
    state = PartialState()
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
