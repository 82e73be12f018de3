"""What the server imports before it forks ranks (tests/checkpoint/kills.py)."""

import os

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed  # noqa: F401
import torch  # noqa: F401

import zeroaccel.accelerator
import zeroaccel.engine.deepspeed  # noqa: F401
