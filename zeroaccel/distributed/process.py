"""What scripts do on some ranks only, or on all at once. Loads no torch until it is used."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from zeroaccel.config.packages import is_tqdm_available
from zeroaccel.config.types import DistributedType
from zeroaccel.errors import ConfigError, ConfigTypeError, MissingPackage

Function = TypeVar("Function", bound=Callable[..., Any])


def wait_for_everyone() -> None:
    """Returns once every rank is here. Collective."""
    from zeroaccel.state import PartialState

    PartialState().wait_for_everyone()


def tqdm(*args: Any, main_process_only: bool = True, **kwargs: Any) -> Any:
    """A progress bar of `tqdm`, shown once a node.

    Args:
        args: what `tqdm.auto.tqdm` takes.
        main_process_only: False shows a bar on every rank.
        kwargs: what `tqdm.auto.tqdm` takes; `disable=True` shows none.

    Raises:
        MissingPackage: tqdm is not installed.
        ConfigTypeError: the first argument is a flag.
    """
    if not is_tqdm_available():
        raise MissingPackage("a progress bar needs tqdm, which is not installed: pip install tqdm")
    if args and isinstance(args[0], bool):
        raise ConfigTypeError(
            f"tqdm was given {args[0]} as what it shall go through: write `tqdm(items, main_process_only={args[0]})`"
        )
    from tqdm.auto import tqdm as bar  # type: ignore[import-untyped]

    from zeroaccel.state import PartialState

    hidden = kwargs.pop("disable", False) or (main_process_only and not PartialState().is_local_main_process)
    return bar(*args, disable=hidden, **kwargs)


def deepspeed_required(func: Function) -> Function:
    """Decorator: the function refuses to run in an Accelerator that is not on DeepSpeed.

    Before there is an Accelerator it runs.
    """

    @functools.wraps(func)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        from zeroaccel.state import AcceleratorState

        kind = AcceleratorState._shared_state.get("distributed_type", DistributedType.DEEPSPEED)
        if kind != DistributedType.DEEPSPEED:
            raise ConfigError(
                f"{func.__name__} needs DeepSpeed, but the Accelerator runs without: pass it a DeepSpeedPlugin,"
                " or start with `zeroaccel launch --use_deepspeed`"
            )
        return func(*args, **kwargs)

    return wrapper  # type: ignore[return-value]
