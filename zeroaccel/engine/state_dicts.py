"""`load_state_dict` on a prepared model: a full, unprefixed state dict, on every stage, into the fp32 masters too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.modules.module import _IncompatibleKeys

from zeroaccel.engine.masters import Share
from zeroaccel.errors import CheckpointError

_EXTRA = "_extra_state"


def load_state_dict(share: Share, state_dict: Mapping[str, Any], strict: bool = True) -> _IncompatibleKeys:
    """Copies whole weights into what each rank holds. Every rank must call it, with the same weights.

    Args:
        share: of the model.
        state_dict: named as in the user's own module; `module.` before every name is taken off.
        strict: every name must be in both.

    Returns:
        Names that only one of them has, as PyTorch's `load_state_dict` does.

    Raises:
        CheckpointError: names, with `strict`, or shapes differ; nothing was loaded.
    """
    given = _without_prefix(state_dict)
    expected = list(share.module.state_dict())
    missing = [name for name in expected if name not in given]
    unexpected = [name for name in given if name not in expected]
    shapes = share.shapes() | {name: tuple(buffer.shape) for name, buffer in share.buffers().items()}
    tied = share.tied()
    values = {tied.get(name, name): value for name, value in given.items() if tied.get(name, name) in shapes}
    problems = [
        f"{name} is {tuple(value.shape)} in the state dict and {shapes[name]} in the model"
        for name, value in values.items()
        if tuple(value.shape) != shapes[name]
    ]
    if strict:
        problems += [f"missing: {', '.join(missing)}"] * bool(missing)
        problems += [f"unexpected: {', '.join(unexpected)}"] * bool(unexpected)
    if problems:
        raise CheckpointError(
            f"the state dict does not fit {type(share.module).__name__}:" + "".join(f"\n  {line}" for line in problems)
        )
    _fill(share, values)
    share.set_extra_state(
        {
            name.removesuffix(_EXTRA).removesuffix("."): value
            for name, value in given.items()
            if name.split(".")[-1] == _EXTRA
        }
    )
    return _IncompatibleKeys(missing, unexpected)


def _without_prefix(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    if state_dict and all(name.startswith("module.") for name in state_dict):
        return {name.removeprefix("module."): value for name, value in state_dict.items()}
    return dict(state_dict)


@torch.no_grad()
def _fill(share: Share, values: Mapping[str, torch.Tensor]) -> None:
    with share.at_rest():
        for shard in share.shards():
            parts = [part for part in shard.slices if part.name in values]
            if not parts:
                continue
            with shard.opened(write=True) as tensors:
                for part in parts:
                    source = values[part.name].detach().reshape(-1)[part.start : part.start + part.count]
                    tensors[shard.kind].narrow(0, part.offset, part.count).copy_(source)
        share.refresh()
