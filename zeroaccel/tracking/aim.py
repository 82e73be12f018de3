"""Aim."""

from __future__ import annotations

import os
from typing import Any

from zeroaccel.tracking.general import GeneralTracker, on_main_process


class AimTracker(GeneralTracker):
    """A run of Aim.

    Args:
        run_name: its name.
        logging_dir: folder of Aim's repository.
        kwargs: for `aim.Run`.
    """

    name = "aim"
    requires_logging_directory = True

    def __init__(self, run_name: str, logging_dir: str | os.PathLike[str] | None = ".", **kwargs: Any) -> None:
        super().__init__()
        self.run_name = run_name
        self.aim_repo_path = logging_dir
        self.init_kwargs = kwargs

    @on_main_process
    def start(self) -> None:
        import aim

        self.writer = aim.Run(repo=self.aim_repo_path, **self.init_kwargs)
        self.writer.name = self.run_name

    @property
    def tracker(self) -> Any:
        """Aim's run."""
        return self.writer

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.writer["hparams"] = values

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        for name, value in values.items():
            self.writer.track(value, name=name, step=step, **kwargs)

    @on_main_process
    def log_images(
        self, values: dict[str, Any], step: int | None = None, kwargs: dict[str, dict[str, Any]] | None = None
    ) -> None:
        """Notes images.

        Args:
            values: by name an image as `aim.Image` takes it, or a pair of an image and its caption.
            step: number of the step that they belong to.
            kwargs: options for `aim.Image` under "aim_image", for `Run.track` under "track".
        """
        from aim import Image

        options = kwargs or {}
        for name, value in values.items():
            image, caption = value if isinstance(value, tuple) else (value, "")
            shown = Image(image, caption=caption, **options.get("aim_image", {}))
            self.writer.track(shown, name=name, step=step, **options.get("track", {}))

    @on_main_process
    def finish(self) -> None:
        self.writer.close()
