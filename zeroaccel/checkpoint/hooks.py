"""What `register_save_state_pre_hook` and `register_load_state_pre_hook` take, and what such a hook is given."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch.utils.hooks import RemovableHandle

Hook = Callable[..., None]


class Hooks:
    """Functions that run before a save or a load, in the order in which they were registered."""

    def __init__(self) -> None:
        self._hooks: OrderedDict[int, Hook] = OrderedDict()

    def register(self, hook: Hook) -> RemovableHandle:
        """Adds one; the handle's `remove()` takes it away."""
        handle = RemovableHandle(self._hooks)
        self._hooks[handle.id] = hook
        return handle

    def run(self, *arguments: Any) -> None:
        """Calls all of them."""
        for hook in list(self._hooks.values()):
            hook(*arguments)


class LazyWeights(dict[str, Any]):
    """A model's weights for a hook: put together when the first one looks into it. All ranks must look, or none.

    Args:
        gather: gives the state dict on rank 0, and perhaps None elsewhere.
    """

    def __init__(self, gather: Callable[[], dict[str, Any] | None]) -> None:
        super().__init__()
        self._gather: Callable[[], dict[str, Any] | None] | None = gather

    def _fill(self) -> None:
        gather, self._gather = self._gather, None
        if gather is not None:
            dict.update(self, gather() or {})

    def __bool__(self) -> bool:
        return True  # `if weights:` of a hook asks for the list, and must gather nothing

    def __reduce__(self) -> Any:
        # In a file it is what a module's state dict is, and torch.load(weights_only=True) reads it.
        return OrderedDict, (), None, None, iter(self.items())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({'not gathered yet' if self._gather else f'{len(self)} tensors'})"


def _after_filling(name: str) -> Callable[..., Any]:
    method = getattr(dict, name)

    @functools.wraps(method)
    def filled(self: LazyWeights, *arguments: Any, **options: Any) -> Any:
        self._fill()
        return method(self, *arguments, **options)

    return filled


for _name in (
    *("__contains__", "__delitem__", "__eq__", "__getitem__", "__ior__", "__iter__", "__len__", "__ne__", "__or__"),
    *("__reversed__", "__ror__", "__setitem__", "clear", "copy", "get", "items", "keys", "pop", "popitem"),
    *("setdefault", "update", "values"),
):
    setattr(LazyWeights, _name, _after_filling(_name))
