"""Gathering what a metric is computed from: each sample of the dataset once."""

from __future__ import annotations

from typing import Any

from zeroaccel.distributed.collectives import gather
from zeroaccel.distributed.nested import concatenate, is_torch_tensor, leaves, recursively_apply, send_to_device
from zeroaccel.distributed.objects import all_objects, gather_object
from zeroaccel.errors import DistributedError
from zeroaccel.logging import library_logger
from zeroaccel.state import GradientState, PartialState
from zeroaccel.state.meeting import meet

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
    # Ranks that took different ways would wait for each other for ever.
    as_objects = meet(state, "gather_for_metrics", flag=use_gather_object or _has_objects(input_data))
    if gradient_state.batch_sizes is not None:
        return _gather_uneven(input_data, gradient_state.batch_sizes, as_objects, state)
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


def _gather_uneven(data: Any, sizes: list[int], as_objects: bool, state: PartialState) -> Any:
    """From ranks whose batches have different sizes; those with a filler give nothing. No sample is repeated there."""
    if as_objects:
        return gather_object(data if sizes[state.process_index] else [])
    with_dimension = recursively_apply(lambda tensor: tensor.cpu() if tensor.ndim else tensor.cpu()[None], data)
    parts = [part for part, size in zip(all_objects(with_dimension), sizes, strict=True) if size]
    try:
        return send_to_device(concatenate(parts), state.device)
    except RuntimeError as error:
        raise DistributedError(
            "gather_for_metrics was given tensors that differ in more than their first dimension: pad them with"
            f" `accelerator.pad_across_processes`. PyTorch said: {error}"
        ) from error


def _has_objects(data: Any) -> bool:
    """Whether this cannot be gathered as tensors. A list may be empty on one rank and hold objects on another."""
    found = list(leaves(data))
    return not found or not all(is_torch_tensor(leaf) for leaf in found)
