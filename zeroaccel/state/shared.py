"""What the three states have in common: all instances of a class show the same."""

from __future__ import annotations

from typing import Any, ClassVar


class Shared:
    """A view of the class's `_shared_state`."""

    _shared_state: ClassVar[dict[str, Any]] = {}

    @property
    def initialized(self) -> bool:
        """Whether the shared state holds anything yet."""
        return bool(self._shared_state)

    def __getattr__(self, name: str) -> Any:
        problem = f"{type(self).__name__!r} object has no attribute {name!r}"
        if not self.__dict__:
            problem += ": its state was reset; create `Accelerator()` again before reading it"
        raise AttributeError(problem)

    def __reduce__(self) -> tuple[Any, ...]:
        # A pickled loader or optimizer shows the state of the process in which it is unpickled.
        return type(self), ()
