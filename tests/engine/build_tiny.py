"""Builds an op that compiles in a second, as a rank builds those of DeepSpeed: `python build_tiny.py SOURCE`."""

from __future__ import annotations

import sys
from typing import Any

from deepspeed.accelerator import get_accelerator
from deepspeed.ops.op_builder.builder import OpBuilder

from zeroaccel.engine import ops

SOURCE = """
#include <Python.h>
static PyModuleDef tiny = {PyModuleDef_HEAD_INIT, "tiny", nullptr, -1, nullptr};
PyMODINIT_FUNC PyInit_tiny() { return PyModule_Create(&tiny); }
"""


class TinyBuilder(OpBuilder):  # type: ignore[misc]
    """An op without PyTorch's headers, which take the compiler ten seconds."""

    def __init__(self) -> None:
        super().__init__("tiny")

    def absolute_name(self) -> str:
        return "tiny"

    def sources(self) -> list[str]:
        return sys.argv[1:]

    def include_paths(self) -> list[str]:
        return ["csrc"]


def create(name: str) -> Any:
    """What the accelerator answers."""
    return TinyBuilder()


if __name__ == "__main__":
    ops.BUILDERS["tiny"] = "TinyBuilder"
    get_accelerator().create_op_builder = create
    ops.build(["tiny"])
    assert ops.status("tiny").state == "ready"
