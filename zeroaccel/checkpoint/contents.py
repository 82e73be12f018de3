"""What a run is made of, as far as a checkpoint holds it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zeroaccel.checkpoint.safe_values import to_safe
from zeroaccel.engine.masters import Share


@dataclass
class Contents:
    """What a run is made of.

    Attributes:
        shares: what this rank holds of each prepared model.
        schedulers: prepared ones.
        loaders: prepared ones; those that have a `state_dict` are saved.
        objects: what the script registered.
        step: blocks of `accumulate()` in the open window.
    """

    shares: list[Share]
    schedulers: list[Any]
    loaders: list[Any]
    objects: list[Any]
    step: int

    def common(self, numbers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What all ranks have in common, as safe values.

        Args:
            numbers: of each model the numbers of its optimizer state by parameter, of all ranks.
        """
        models = [
            {
                "groups": [
                    {"rule": group.rule, "names": group.names, "settings": group.settings()} for group in share.groups
                ],
                "numbers": dict(own),
                "counters": share.counters(),
                "open": share.open_micro_batches(),
                "layout": share.gradient_layout(),
                "extra": share.extra_state(),
            }
            for share, own in zip(self.shares, numbers, strict=True)
        ]
        common = {"step": self.step, "models": to_safe(models, "the models' own state")}
        common["schedulers"] = [
            to_safe(scheduler.state_dict(), f"{type(scheduler.scheduler).__name__}.state_dict()")
            for scheduler in self.schedulers
        ]
        return common

    def loader_states(self) -> list[Any]:
        """Position of each loader on this rank, None where it keeps none."""
        return [
            to_safe(loader.state_dict(), f"{type(loader).__name__}.state_dict()")
            if hasattr(loader, "state_dict")
            else None
            for loader in self.loaders
        ]

    def object_states(self) -> list[Any]:
        """State of each registered object."""
        return [to_safe(one.state_dict(), f"{type(one).__name__}.state_dict()") for one in self.objects]


def numbers_by_parameter(share: Share) -> dict[str, dict[str, Any]]:
    """Numbers of the optimizer's state on this rank: parameter -> name -> value."""
    found: dict[str, dict[str, Any]] = {}
    for shard in share.trained:
        if numbers := shard.numbers():
            found |= {part.name: to_safe(numbers, f"optimizer state of {part.name}") for part in shard.slices}
    return found
