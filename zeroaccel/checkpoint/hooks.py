"""What `register_save_state_pre_hook` and `register_load_state_pre_hook` take, and what such a hook is given."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
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


class LazyWeights(Mapping[str, Any]):
    """A model's weights for a hook: put together when the first one reads it. All ranks must read it, or none.

    Args:
        gather: gives the state dict on rank 0, and perhaps None elsewhere.
    """

    def __init__(self, gather: Callable[[], dict[str, Any] | None]) -> None:
        self._gather = gather
        self._weights: dict[str, Any] | None = None

    def _gathered(self) -> dict[str, Any]:
        if self._weights is None:
            self._weights = self._gather() or {}
        return self._weights

    def __getitem__(self, name: str) -> Any:
        return self._gathered()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._gathered())

    def __len__(self) -> int:
        return len(self._gathered())

    def __bool__(self) -> bool:
        return True  # `if weights:` of a hook asks for the list, and must gather nothing

    def __reduce__(self) -> Any:
        return dict, (self._gathered(),)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({'not gathered yet' if self._weights is None else f'{len(self)} tensors'})"
