"""What `zeroaccel launch` makes of a command line, without starting anything."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.commands.runs import OF_A_LAUNCHER, SCRIPTS
from zeroaccel.commands import launch
from zeroaccel.commands.job import ElasticJob, Job
from zeroaccel.commands.launch_options import parse
from zeroaccel.commands.launch_settings import Settings, settle

SCRIPT = str(SCRIPTS / "report.py")


@pytest.fixture(autouse=True)
def nothing_launched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No variable of a launcher and no launch configuration is there; what a test sets is gone afterwards."""
    for name in [name for name in os.environ if name.startswith(OF_A_LAUNCHER)]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setenv("ZEROACCEL_HOME", str(tmp_path / "home"))


def settled(options: str, script: str = SCRIPT) -> Settings:
    """The options of a command line, checked."""
    settings = settle(parse([*options.split(), script]))
    launch.check(settings)
    return settings


def job_of(options: str, devices: int = 0, script: str = SCRIPT) -> Job:
    """The job of a command line on a machine with so many GPUs."""
    return launch.plan(settled(options, script), devices)


def elastic(options: str, devices: int = 0) -> ElasticJob:
    """The same, where torch's launcher starts the ranks."""
    job = job_of(options, devices)
    assert isinstance(job, ElasticJob)
    return job
