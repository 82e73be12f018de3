"""`zeroaccel test`: it passes here, and it finds what is broken."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from tests.commands.runs import run
from tests.distributed.pool import RankPool
from zeroaccel.commands.main import main

ZEROACCEL_TEST = (sys.executable, "-m", "zeroaccel", "test", "--cpu")
CONFIGURATION = """
compute_environment: LOCAL_MACHINE
distributed_type: DEEPSPEED
deepspeed_config: {zero_stage: 3, gradient_accumulation_steps: 3, gradient_clipping: 0.3}
mixed_precision: bf16
num_processes: 2
use_cpu: true
"""


def test_every_stage_and_the_configuration_agree_with_pytorch(tmp_path: Path) -> None:
    (tmp_path / "conf.yaml").write_text(CONFIGURATION)
    result = run((*ZEROACCEL_TEST, "--config_file", str(tmp_path / "conf.yaml")), tmp_path)
    assert (result.status, result.err) == (0, "")
    *rows, verdict = result.out.splitlines()
    names = ["ranks", "data", *(f"ZeRO stage {stage}" for stage in range(4)), "as configured"]
    assert [row.partition("✓")[0].strip() for row in rows] == names
    assert "2 on cpu, gloo" in rows[0]
    assert verdict == "All agree with plain PyTorch."


@pytest.mark.full
def test_what_differs_is_told_and_is_the_exit_status(tmp_path: Path) -> None:
    broken = "import torch\ntorch.nn.utils.clip_grad_norm_ = lambda *args, **kwargs: torch.tensor(1.0)\n"
    (tmp_path / "sitecustomize.py").write_text(broken)
    result = run((*ZEROACCEL_TEST, "--num_processes", "2"), tmp_path, PYTHONPATH=str(tmp_path))
    assert result.status == 1
    assert result.out.count("✗") == 4
    assert "      rank 1: weights differ by " in result.out
    assert result.out.endswith("Some do not agree with plain PyTorch.\n")


def test_an_option_that_makes_no_sense_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["test", "--num_processes", "0"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


# --- in ranks ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _no_clipping() -> Any:
    from zeroaccel import Accelerator

    with patch.object(Accelerator, "clip_grad_norm_", lambda self, parameters, norm: torch.tensor(0.8)):
        yield


@contextlib.contextmanager
def _doubled_gradients() -> Any:
    from zeroaccel import Accelerator

    backward = Accelerator.backward
    with patch.object(Accelerator, "backward", lambda self, loss: backward(self, 2.0 * loss)):
        yield


@contextlib.contextmanager
def _larger_steps_on_rank_1() -> Any:
    from zeroaccel.commands import selftest_rank
    from zeroaccel.state import PartialState

    make = selftest_rank.make_optimizer

    def larger(model: Any) -> torch.optim.Optimizer:
        optimizer = make(model)
        if PartialState().process_index == 1:
            optimizer.param_groups[0]["lr"] *= 1.1
        return optimizer

    with patch.object(selftest_rank, "make_optimizer", larger):
        yield


# What is broken, and what is found on at least one rank.
BROKEN: dict[str, tuple[Callable[[], Any], str]] = {
    "clipping": (_no_clipping, "gradient norms are 0.8 0.8 0.8 0.8, in plain PyTorch "),
    "gradients": (_doubled_gradients, "gradient norms are "),
    "one rank": (_larger_steps_on_rank_1, "weights differ by "),
}


def find(broken: str | None, stage: int) -> str | None:
    from zeroaccel.commands import selftest_rank

    with BROKEN[broken][0]() if broken else contextlib.nullcontext():
        return selftest_rank.check_stage(stage).problem


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("stage", [2, *(pytest.param(stage, marks=pytest.mark.full) for stage in (0, 1, 3))])
def test_found_is_broken(broken: str, stage: int, ranks: RankPool) -> None:
    assert any(BROKEN[broken][1] in (problem or "") for problem in ranks.run(find, broken=broken, stage=stage))
    assert ranks.run(find, broken=None, stage=stage) == [None, None]


CONFIGURED = {
    "an optimizer and a scheduler of the config": (
        '{"zero_optimization": {"stage": 2}, "train_batch_size": 12,'
        ' "train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": "auto",'
        ' "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},'
        ' "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 1, "total_num_steps": "auto"}}}',
        {},
    ),
    "fp16": ("", {"mixed_precision": "fp16", "zero_stage": 2, "gradient_accumulation_steps": 2}),
    "offload": ("", {"zero_stage": 3, "offload_optimizer_device": "cpu", "offload_param_device": "cpu"}),
}


def train_as_configured(values: dict[str, Any]) -> tuple[str, str | None]:
    from zeroaccel.commands import selftest_rank
    from zeroaccel.config import environment
    from zeroaccel.config.env_patch import patch_environment

    with patch_environment(**environment.exports({"use_deepspeed": True, **values})):
        found = selftest_rank.check_configuration()
    return found.told, found.problem


@pytest.mark.parametrize("case", [pytest.param("fp16", marks=pytest.mark.full), *sorted(CONFIGURED.keys() - {"fp16"})])
def test_a_configuration_is_trained_with(case: str, ranks: RankPool, tmp_path: Path) -> None:
    config, values = CONFIGURED[case]
    if config:
        (tmp_path / "ds.json").write_text(config)
        values = {**values, "deepspeed_config_file": str(tmp_path / "ds.json")}
    found = ranks.run(train_as_configured, values=values)
    assert [problem for _, problem in found] == [None, None]
    assert ("with the optimizer of the DeepSpeed config" in found[0][0]) == bool(config)


def print_rows() -> tuple[bool, str]:
    from zeroaccel.commands import selftest_rank
    from zeroaccel.state import PartialState

    wrong = "it is wrong" if PartialState().process_index == 1 else None
    table = {"one": lambda: selftest_rank.Found("fine"), "two": lambda: selftest_rank.Found("odd", wrong)}
    with contextlib.redirect_stdout(io.StringIO()) as output:
        return selftest_rank.run_checks(table), output.getvalue()


def test_what_any_rank_finds_is_in_the_table(ranks: RankPool) -> None:
    (passed, table), (passed_on_1, table_on_1) = ranks.run(print_rows)
    assert (passed, passed_on_1, table_on_1) == (False, False, "")
    assert (
        table == "  one            ok  fine  (0.0 s)\n  two            WRONG  odd  (0.0 s)\n      rank 1: it is wrong\n"
    )
