"""TensorBoard: event files in a folder."""

from __future__ import annotations

import os
import time
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from zeroaccel.tracking.general import GeneralTracker, on_main_process, plain, taken


class _Plain(yaml.SafeDumper):
    """Writes numbers of NumPy and PyTorch as numbers, enumerations as their values, all else as its text."""


def _represent(dumper: yaml.SafeDumper, given: Any) -> yaml.Node:
    value = given.value if isinstance(given, Enum) else plain(given)
    return dumper.represent_data(str(value) if type(value) is type(given) else value)


_Plain.add_multi_representer(object, _represent)


class TensorBoardTracker(GeneralTracker):
    """Writes event files to `<logging_dir>/<run_name>`.

    Args:
        run_name: of the project.
        logging_dir: root of all logs.
        kwargs: for `SummaryWriter`.
    """

    name = "tensorboard"
    requires_logging_directory = True

    def __init__(self, run_name: str, logging_dir: str | os.PathLike[str], **kwargs: Any) -> None:
        super().__init__()
        self.run_name = run_name
        self.logging_dir_param = logging_dir
        self.init_kwargs = kwargs

    @on_main_process
    def start(self) -> None:
        self.logging_dir = os.path.join(self.logging_dir_param, self.run_name)
        try:
            from torch.utils import tensorboard
        except ImportError:
            import tensorboardX as tensorboard  # type: ignore[no-redef]
        self.writer: Any = tensorboard.SummaryWriter(self.logging_dir, **self.init_kwargs)

    @property
    def tracker(self) -> Any:
        """The `SummaryWriter`."""
        return self.writer

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Notes hyperparameters as TensorBoard's, and in `<logging_dir>/<run_name>/<time>/hparams.yml`.

        Raises:
            ValueError: one of them is not a bool, str, float, int or None.
        """
        self.writer.add_hparams({name: plain(value) for name, value in values.items()}, metric_dict={})
        self.writer.flush()
        folder = Path(self.logging_dir, str(time.time()))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "hparams.yml").write_text(yaml.dump(values, Dumper=_Plain))

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Notes numbers as scalars, texts as text, dictionaries of numbers as several scalars in one chart.

        What is none of these is left out with a warning.

        Args:
            values: by name.
            step: number of the step that they belong to.
            kwargs: for `add_scalar`, `add_text` or `add_scalars`.
        """
        for name, value in taken(self.name, "numbers and texts", values, (int, float, str, dict)):
            if isinstance(value, (int, float)):
                self.writer.add_scalar(name, value, global_step=step, **kwargs)
            elif isinstance(value, str):
                self.writer.add_text(name, value, global_step=step, **kwargs)
            else:
                self.writer.add_scalars(name, value, global_step=step, **kwargs)
        self.writer.flush()

    @on_main_process
    def log_images(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Notes batches of images.

        Args:
            values: by name arrays as `add_images` takes them, N x H x W x C with `dataformats="NHWC"`.
            step: number of the step that they belong to.
            kwargs: for `add_images`.
        """
        for name, images in values.items():
            self.writer.add_images(name, images, global_step=step, **kwargs)

    @on_main_process
    def finish(self) -> None:
        self.writer.close()
