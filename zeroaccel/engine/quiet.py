"""Keeps DeepSpeed off stdout, which is the script's."""

from __future__ import annotations

import importlib
import logging
import sys
import warnings
from typing import Any

from deepspeed.utils import logger as deepspeed_logger

from zeroaccel.logging import library_logger

logger = library_logger(__name__)

# Warnings that nobody can act on: our own settings cause them, and tests cover what they warn of.
POINTLESS = (
    "You are using ZeRO with an untested optimizer",
    "Attempting to get learning rate from scheduler before it has started",
)
# DeepSpeed's own calls, which PyTorch warns of at every step.
DEPRECATED_CALLS = r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated"


class _Pointless(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not any(text in record.getMessage() for text in POINTLESS)


def quiet_deepspeed() -> None:
    """Sends DeepSpeed's log to stderr, without what is pointless there; its one `print` becomes a debug message."""
    for handler in deepspeed_logger.handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stdout:
            handler.setStream(sys.stderr)
    if not any(isinstance(existing, _Pointless) for existing in deepspeed_logger.filters):
        deepspeed_logger.addFilter(_Pointless())
        warnings.filterwarnings("ignore", message=DEPRECATED_CALLS, category=FutureWarning)
    # By its name, because the attribute deepspeed.comm.torch is PyTorch itself.
    importlib.import_module("deepspeed.comm.torch").print = _log_instead  # type: ignore[attr-defined]


def _log_instead(*values: Any, **_: Any) -> None:
    logger.debug(" ".join(map(str, values)))
