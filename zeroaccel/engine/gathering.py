"""`accelerator.gathered_parameters`: whole parameters on every rank for a while, and changes that last."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
import torch.distributed

from zeroaccel.engine.masters import WEIGHT, Share, names_of
from zeroaccel.engine.shards import as_on_first_rank, is_here, is_split, logical_shape, own_part
from zeroaccel.errors import ConfigTypeError, DistributedError, UsageError
from zeroaccel.state import PartialState
from zeroaccel.state.meeting import meet

# Parameters in open blocks, by `id`: whether the block keeps changes.
_open: dict[int, bool] = {}


@contextmanager
def gathered(what: Any, modify: bool, shares: Callable[[], list[Share]]) -> Iterator[None]:
    """See `Accelerator.gathered_parameters`.

    Args:
        what: a module, a parameter, or several of them.
        modify: whether changes are kept.
        shares: gives what this rank holds of the prepared models.
    """
    given = {id(parameter): parameter for parameter in _parameters(what)}
    listed = [(tuple(logical_shape(parameter)), str(parameter.dtype)) for parameter in given.values()]
    remedy = "give all ranks the same parameters and the same modify"
    meet(PartialState(), "gathered_parameters", f"modify={modify}, {listed}", remedy)
    if modify and any(_open.get(key) is False for key in given):
        raise UsageError(
            "gathered_parameters(modify=True) inside a block that has gathered the same parameters without it: write"
            " modify=True in the outer one"
        )
    parameters = [parameter for key, parameter in given.items() if key not in _open]
    _open.update(dict.fromkeys(map(id, parameters), modify))
    try:
        with _whole(parameters):
            block = _Block(parameters, modify)
            try:
                yield
            except BaseException:
                block.put_back()
                with suppress(DistributedError):  # this rank's exception says more
                    block.agree("failed")
                raise
            block.end()
    finally:
        for parameter in parameters:
            del _open[id(parameter)]
    if modify:
        for share in shares():
            _follow(share, parameters)


def _parameters(what: Any) -> Iterator[torch.Tensor]:
    if isinstance(what, torch.nn.Module):
        yield from what.parameters()
    elif isinstance(what, torch.Tensor):
        yield what
    elif isinstance(what, Iterable) and not isinstance(what, (str, bytes, dict)):
        for one in what:
            yield from _parameters(one)
    else:
        raise ConfigTypeError(
            f"gathered_parameters takes a model, a parameter or several of them, got {type(what).__name__}"
        )


def _whole(parameters: list[Any]) -> Any:
    split = [parameter for parameter in parameters if is_split(parameter)]
    if not split:
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    context = GatheredParameters(split)
    context.enable_sanity_checks = False  # it misses changes through `data`, and knows none that are kept
    return context


class _Block:
    """What has to hold at the end of a block, on all ranks.

    Args:
        parameters: whole.
        modify: whether changes are kept.
    """

    def __init__(self, parameters: list[Any], modify: bool) -> None:
        self._parameters = parameters
        self._modify = modify
        self._data = [parameter.data for parameter in parameters]
        self._marks = [] if modify else [_mark(parameter) for parameter in parameters]

    def agree(self, problem: str | None) -> bool:
        """Whether any rank has a problem. Collective."""
        return meet(PartialState(), "the end of a gathered_parameters block", flag=problem is not None)

    def put_back(self) -> None:
        """Tensors that the block put in the place of whole parameters' go; ZeRO knows the old ones."""
        for parameter, data in zip(self._parameters, self._data, strict=True):
            if not is_split(parameter):
                parameter.data = data

    def end(self) -> None:
        """Keeps changes, or sees to it that there are none. Collective.

        Raises:
            UsageError: parameters were changed that must not be, or in a way that cannot be kept.
            DistributedError: another rank has a problem.
        """
        problem = self._problem()
        if self.agree(problem):
            self.put_back()
            if problem is None:
                raise DistributedError("a block of gathered_parameters failed on another rank: see its error")
            raise UsageError(problem)
        if self._modify:
            self._keep()

    def _problem(self) -> str | None:
        for number, (parameter, data) in enumerate(zip(self._parameters, self._data, strict=True)):
            called = f"a parameter of shape {tuple(data.shape)}"
            if not is_here(parameter):
                if self._modify:
                    return (
                        f"{called} was split again inside gathered_parameters(modify=True), by a forward pass of its"
                        " model, so what was changed is lost: run the model outside of the block"
                    )
            elif parameter.shape != data.shape:
                return f"{called} has shape {tuple(parameter.shape)} at the end of gathered_parameters: keep its shape"
            elif not self._modify and _mark(parameter) != self._marks[number]:
                return (
                    f"{called} was changed inside gathered_parameters, which keeps no changes unless it is told to:"
                    " write gathered_parameters(..., modify=True)"
                )
        return None

    @torch.no_grad()
    def _keep(self) -> None:
        for parameter, data in zip(self._parameters, self._data, strict=True):
            if parameter.data_ptr() != data.data_ptr():  # `parameter.data = ...`: ZeRO knows the old tensor
                data.copy_(parameter.data)
                parameter.data = data
            if PartialState().num_processes > 1:
                sent = parameter.data.contiguous()
                as_on_first_rank(parameter, sent)
                parameter.data.copy_(sent)
        split = [parameter for parameter in self._parameters if is_split(parameter)]
        if split:
            split[0].partition(param_list=split, has_been_updated=True)


def _mark(parameter: Any) -> Any:
    """Changes with the value: the version sees changes of the parameter, the sum those of its `data`."""
    data = parameter.data
    same = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[data.element_size()]
    total = int(data.contiguous().view(-1).view(same).sum()) if data.numel() else 0
    return parameter._version, data.data_ptr(), total


@torch.no_grad()
def _follow(share: Share, parameters: list[Any]) -> None:
    """Takes new weights over into the masters; an element that is the same keeps the master's greater precision."""
    names = names_of(share.module)
    changed = {names[id(parameter)]: parameter for parameter in parameters if id(parameter) in names}
    if not changed:
        return
    with share.at_rest():
        for shard in share.trained:
            parts = [part for part in shard.slices if part.name in changed and part.count]
            if not parts:
                continue
            new = [_elements(changed[part.name], part.start, part.count) for part in parts]
            with shard.opened(write=True) as tensors:
                for part, values in zip(parts, new, strict=True):
                    master = tensors[WEIGHT].narrow(0, part.offset, part.count)
                    values = values.to(master.device)
                    same = master.to(values.dtype) == values
                    master.copy_(torch.where(same, master, values.to(master.dtype)))


def _elements(parameter: Any, start: int, count: int) -> torch.Tensor:
    """Consecutive elements of a parameter that this rank has."""
    if not is_split(parameter):
        return parameter.data.reshape(-1).narrow(0, start, count)  # type: ignore[no-any-return]
    begin = parameter.partition_numel() * torch.distributed.get_rank(parameter.ds_process_group)
    with own_part(parameter) as part:
        return part.narrow(0, start - begin, count).clone()
