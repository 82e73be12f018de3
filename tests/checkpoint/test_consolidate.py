"""Weights of checkpoints, of every stage and either format, put together without DeepSpeed and without a GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint import models
from tests.distributed.pool import RankPool
from zeroaccel.checkpoint import (
    consolidate,
    get_fp32_state_dict_from_zero_checkpoint,
    load_state_dict_from_zero_checkpoint,
)
from zeroaccel.checkpoint.load_weights import load_state_dict, weight_files
from zeroaccel.errors import CheckpointError, ConfigError

CASES = [
    (0, "none", "no"),
    (0, "none", "bf16"),
    (1, "none", "no"),
    (1, "none", "bf16"),
    (2, "cpu", "no"),
    (2, "none", "fp16"),
    (3, "none", "no"),
    (3, "cpu", "bf16"),
]


def _masters(model: Any) -> dict[str, torch.Tensor]:
    """Weights in fp32, by DeepSpeed's own means."""
    from deepspeed.utils import safe_get_full_fp32_param

    found = {name: v.float() if v.is_floating_point() else v for name, v in models.whole(model).items()}
    for name, parameter in model.module.named_parameters(remove_duplicate=False):
        if parameter.requires_grad and hasattr(
            model.optimizer, "bit16_groups" if model.zero_optimization_stage() < 3 else "fp16_groups"
        ):
            master = safe_get_full_fp32_param(parameter)
            found[name] = found[name] if master is None else master.detach().cpu().clone()
    return found


def _save(stage: int, offload: str, precision: str, folder: str) -> dict[str, Any]:
    running, model, _ = models.trained(stage, offload, precision)
    running.save_state(f"{folder}/own")
    model.save_checkpoint(f"{folder}/deepspeed")
    return _masters(model)


def _check(found: dict[str, Any], wanted: dict[str, Any], rough: bool) -> None:
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        tolerance = 1e-2 if rough else 0.0
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize(("stage", "offload", "precision"), CASES, ids=["-".join(map(str, case)) for case in CASES])
def test_both_formats_give_the_masters(
    ranks: RankPool, tmp_path: Path, stage: int, offload: str, precision: str
) -> None:
    wanted = ranks.run(_save, stage=stage, offload=offload, precision=precision, folder=str(tmp_path))[0]
    # Below stage 1 nothing tells the masters, and DeepSpeed's file has the 16-bit weights only.
    rough = stage == 0 and precision != "no"
    for kind in ("own", "deepspeed"):
        _check(get_fp32_state_dict_from_zero_checkpoint(tmp_path / kind), wanted, rough)
        model = load_state_dict_from_zero_checkpoint(models.everything(), tmp_path / kind)
        _check(model.state_dict(), wanted, rough)
        for dtype, size in (("fp32", "10GB"), ("bf16", 200)):
            out = tmp_path / f"{kind}-{dtype}"
            consolidate(tmp_path / kind, out, dtype, size)
            found = {name: tensor for path in weight_files(out) for name, tensor in load_state_dict(path).items()}
            once = {name: value for name, value in wanted.items() if name != "head.weight"}
            if dtype == "bf16":
                once = {name: v.bfloat16() if v.is_floating_point() else v for name, v in once.items()}
            _check(found, once, rough)
    if stage > 0:
        _deepspeeds_own_functions(tmp_path / "deepspeed", wanted, stage)


def _deepspeeds_own_functions(folder: Path, wanted: dict[str, torch.Tensor], stage: int) -> None:
    from deepspeed.utils import zero_to_fp32

    state = zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(str(folder))
    lost = {"frozen.weight", "frozen.bias"} if stage == 1 else set()  # DeepSpeed 0.19.8 forgets them there
    state = {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
    _check(state, {name: value for name, value in wanted.items() if name not in lost}, rough=False)
    if not lost:
        model = zero_to_fp32.load_state_dict_from_zero_checkpoint(models.everything(), str(folder))
        _check(model.state_dict(), wanted, rough=False)


@pytest.fixture(scope="module")
def saved(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of stage 3 in both formats."""
    folder = tmp_path_factory.mktemp("saved")
    ranks.run(_save, stage=3, offload="none", precision="no", folder=str(folder))
    return folder


def _zeroaccel(*arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "zeroaccel", "merge-weights", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_the_command(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "own", tmp_path / "own")
    done = _zeroaccel(
        tmp_path / "own", tmp_path / "out", "--dtype", "fp16", "--unsafe-serialization", "--remove_checkpoint_dir"
    )
    assert (done.returncode, done.stdout) == (0, f"1 file in {tmp_path / 'out'}: pytorch_model.bin\n")
    assert not (tmp_path / "own").exists()
    found = load_state_dict(tmp_path / "out/pytorch_model.bin")
    assert found["hidden.weight"].dtype == torch.float16
    assert "head.weight" in found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "out"], "there is no folder"),
        (["deepspeed", "out", "--tag", "step9"], "there is no folder.*global_step2"),
        (["own", "out", "--tag", "a"], "has no tags"),
        (["own", "out", "--model", "1"], "there is no model 1"),
        (["own", "own/out", "--remove_checkpoint_dir"], "would remove the weights, too"),
        (["own", "out", "--max_shard_size", "much"], "is unclear"),
        (["empty", "out"], "no checkpoint"),
    ],
)
def test_the_command_refuses_in_one_line(saved: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    import re

    for kind in ("own", "deepspeed"):
        (tmp_path / kind).symlink_to(saved / kind)
    (tmp_path / "empty").mkdir()
    paths = [tmp_path / arguments[0], tmp_path / arguments[1], *arguments[2:]]
    done = _zeroaccel(*paths)
    assert done.returncode == 2
    assert re.search(message, done.stderr.strip())
    assert "\n" not in done.stderr.strip()
    assert not (tmp_path / "out").exists()


def test_deepspeed_is_not_needed(saved: Path, tmp_path: Path) -> None:
    program = """
import sys
sys.modules["deepspeed"] = None
from zeroaccel.checkpoint import consolidate
for kind in ("own", "deepspeed"):
    consolidate(f"{sys.argv[1]}/{kind}", f"{sys.argv[2]}/{kind}")
"""
    subprocess.run([sys.executable, "-c", program, saved, tmp_path], timeout=60, check=True)
    assert (tmp_path / "deepspeed/model.safetensors").exists()


def test_frozen_parameters_can_be_left_out(saved: Path) -> None:
    for kind in ("own", "deepspeed"):
        found = get_fp32_state_dict_from_zero_checkpoint(saved / kind, exclude_frozen_parameters=True)
        assert not [name for name in found if name.startswith("frozen")]
        assert "hidden.weight" in found


class _Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/zeroaccel-was-here",)


@pytest.mark.parametrize("damage", ["flipped", "cut", "lost rank", "evil"])
def test_damage_is_found(saved: Path, tmp_path: Path, damage: str) -> None:
    for kind in ("own", "deepspeed"):
        shutil.copytree(saved / kind, tmp_path / kind)
        pattern = "**/model_0.rank_00001.safetensors" if kind == "own" else "**/*rank_1_*optim_states.pt"
        (path,) = (tmp_path / kind).glob(pattern)
        data = bytearray(path.read_bytes())
        if damage == "flipped" and kind == "own":
            data[-3] ^= 4
            path.write_bytes(data)
        elif damage == "lost rank":
            path.unlink()
        elif damage == "evil":
            torch.save({"optimizer_state_dict": _Evil()}, path)
        else:
            path.write_bytes(data[: len(data) // 2])
        with pytest.raises((CheckpointError, ConfigError)):
            consolidate(tmp_path / kind, tmp_path / "out")
    assert not os.path.exists("/tmp/zeroaccel-was-here")


def test_the_script_in_the_checkpoint_takes_deepspeeds_arguments(saved: Path, tmp_path: Path) -> None:
    """The same command line for either folder gives the same weights."""
    for kind in ("own", "deepspeed"):
        command = [
            sys.executable,
            "zero_to_fp32.py",
            ".",
            tmp_path / kind,
            "--max_shard_size",
            "1KB",
            "--safe_serialization",
        ]
        subprocess.run(command if kind == "own" else command[:-1], cwd=saved / kind, timeout=60, check=True)
    own, theirs = (
        {name: tensor for path in weight_files(tmp_path / kind) for name, tensor in load_state_dict(path).items()}
        for kind in ("own", "deepspeed")
    )
    theirs.pop("head.weight")  # a safetensors file has tied weights once
    _check(own, theirs, rough=False)
