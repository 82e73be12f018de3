"""Weights leave a running model on every stage: as a dictionary, as files that other libraries read."""

from __future__ import annotations

import json
import os
import re
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoint import models
from tests.distributed.pool import RankPool, reset_states
from zeroaccel.errors import CheckpointError, ConfigError

PLACES = [
    *((stage, "none", "no", True) for stage in (0, 1, 2, 3)),
    (1, "none", "bf16", True),
    (2, "cpu", "fp16", True),
    (3, "none", "bf16", True),
    (3, "cpu", "no", True),
    (3, "none", "no", False),
]
IDS = ["-".join(map(str, place[:3])) + "-split" * place[3] for place in PLACES]


def _files(folder: str) -> list[str]:
    return sorted(name for name in os.listdir(folder) if not name.endswith(".json"))


def _read(folder: str) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for name in _files(folder):
        path = os.path.join(folder, name)
        found |= load_file(path) if name.endswith("safetensors") else torch.load(path, weights_only=True)
    return found


def _same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype, name
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, msg=name)


def _export(stage: int, offload: str, precision: str, split: bool, folder: str) -> None:
    """All ways out of one model, on every rank."""
    running, model, _ = models.trained(stage, offload, precision, split=split)
    wanted = models.whole(model)
    state = running.get_state_dict(model)
    if running.is_main_process or stage < 3:
        assert list(state) == list(wanted)
        _same(state, wanted)
    else:
        assert state is None
    if running.is_main_process:
        assert state["head.weight"] is state["embedding.weight"]
        assert state["hidden.weight"].untyped_storage().nbytes() == state["hidden.weight"].nbytes, "a copy of its own"
    running.save(state, f"{folder}/state.bin")
    running.save(model.module.state_dict() if stage < 3 else state, f"{folder}/state.safetensors", True)
    for safe in (True, False):
        for size in ("10GB", 300):
            running.save_model(model, f"{folder}/{safe}-{size}", max_shard_size=size, safe_serialization=safe)
    if running.is_main_process:
        once = {name: value for name, value in wanted.items() if name != "head.weight"}
        _same(torch.load(f"{folder}/state.bin", weights_only=True), wanted)
        _same(load_file(f"{folder}/state.safetensors"), once)
        _check_files(folder, wanted, once)


def _check_files(folder: str, wanted: dict[str, torch.Tensor], once: dict[str, torch.Tensor]) -> None:
    assert os.listdir(f"{folder}/True-10GB") == ["model.safetensors"]
    assert os.listdir(f"{folder}/False-10GB") == ["pytorch_model.bin"]
    for kind in ("True", "False"):
        for size in ("10GB", "300"):
            _same(_read(f"{folder}/{kind}-{size}"), once if kind == "True" else wanted)
        sharded = Path(folder, f"{kind}-300")
        assert len(_files(str(sharded))) > 1
        (index,) = sharded.glob("*.index.json")
        assert not list(sharded.glob(".*"))
        where = json.loads(index.read_text())["weight_map"]
        assert set(where) == set(once if kind == "True" else wanted)
        assert set(where.values()) == set(_files(str(sharded)))


@pytest.mark.parametrize("place", PLACES, ids=IDS)
def test_weights_are_those_of_the_running_model(ranks: RankPool, tmp_path: Path, place: tuple[Any, ...]) -> None:
    stage, offload, precision, split = place
    ranks.run(_export, stage=stage, offload=offload, precision=precision, split=split, folder=str(tmp_path))


def _export_from_disk(folder: str) -> None:
    """Parameters that are large enough to be swapped out: the others stay in memory."""
    from tests.engine.small import accelerator

    running = accelerator(zero_stage=3, offload_param_device="nvme", offload_param_nvme_path=folder)
    config = running.state.deepspeed_plugin.deepspeed_config
    config["train_micro_batch_size_per_gpu"] = 8
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    torch.manual_seed(17)
    plain = torch.nn.Sequential(torch.nn.Linear(512, 1031), torch.nn.Linear(1031, 512, bias=False))
    wanted = {name: value.clone() for name, value in plain.state_dict().items()}
    model = running.prepare(plain)
    statuses = {parameter.ds_tensor.status.name for parameter in model.parameters()}
    assert "NOT_AVAILABLE" in statuses, "nothing is on the disk"
    running.save_model(model, f"{folder}/out")
    running.wait_for_everyone()
    _same(_read(f"{folder}/out"), wanted)
    assert {parameter.ds_tensor.status.name for parameter in model.parameters()} == statuses
    model(torch.ones(2, 512))


def test_weights_on_nvme_are_read_one_by_one(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(_export_from_disk, folder=str(tmp_path))


def _plain(folder: str) -> None:
    from zeroaccel import Accelerator

    running = Accelerator(cpu=True)
    model = running.prepare(models.everything())
    state = running.get_state_dict(model)
    assert state["hidden.weight"].data_ptr() == model.hidden.weight.data_ptr(), "no copy"
    running.save_model(model, folder)
    once = {name: value for name, value in state.items() if name != "head.weight"}
    _same(_read(folder), once)


def test_without_deepspeed(tmp_path: Path) -> None:
    reset_states()
    _plain(str(tmp_path))


def _without_flag(running: Any, model: Any, folder: str) -> None:
    model._config.zero_config.gather_16bit_weights_on_model_save = False
    running.get_state_dict(model)


def _placeholder(running: Any, model: Any, folder: str) -> None:
    running.save({"step": 3, "model": model.state_dict()}, f"{folder}/torn.bin")


def _renamed(running: Any, model: Any, folder: str) -> None:
    model.module.register_state_dict_post_hook(_rename)
    running.save_model(model, folder)


def _a_file(running: Any, model: Any, folder: str) -> None:
    Path(folder, "file").touch()
    running.save_model(model, f"{folder}/file")


def _no_tensor(running: Any, model: Any, folder: str) -> None:
    model.module.norm.__class__ = _WithExtraState
    running.save_model(model, folder)


class _WithExtraState(torch.nn.LayerNorm):
    def get_extra_state(self) -> dict[str, int]:
        return {"seen": 1}


def _rename(module: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    state["another"] = state.pop("hidden.weight").detach()


def _refused(what: str, folder: str) -> str:
    running, model, _ = models.trained(3, steps=0)
    with pytest.raises(ConfigError) as caught:
        globals()[what](running, model, folder)
    return str(caught.value)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("_without_flag", "stage3_gather_16bit_weights_on_model_save"),
        ("_placeholder", r"frozen\.weight.* no values"),
        ("_renamed", "another has no value"),
        ("_a_file", "is a file"),
        ("_no_tensor", r"norm\._extra_state: no tensors"),
    ],
)
def test_what_would_be_wrong_is_refused(ranks: RankPool, tmp_path: Path, what: str, message: str) -> None:
    for told in ranks.run(_refused, what=what, folder=str(tmp_path)):
        assert re.search(message, told), told
    assert not [path for path in tmp_path.iterdir() if path.name != "file"]


def _full_disk(folder: str) -> str:
    """A file-size limit on rank 0 stands for a full disk."""
    import signal

    running, model, _ = models.trained(3)
    running.save_model(model, folder)
    before = _read(folder)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if running.is_main_process:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, hard))
    try:
        with pytest.raises(CheckpointError) as caught:
            running.save_model(model, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    running.wait_for_everyone()
    _same(_read(folder), before)
    assert os.listdir(folder) == ["model.safetensors"]
    return str(caught.value)


def test_a_full_disk_is_the_same_error_on_every_rank_and_keeps_the_older_files(ranks: RankPool, tmp_path: Path) -> None:
    first, second = ranks.run(_full_disk, folder=str(tmp_path))
    assert "File too large" in first
    assert first == second


def _overwrite(folder: str) -> None:
    running, model, _ = models.trained(3)
    running.save_model(model, folder, max_shard_size=300)
    if running.is_main_process:
        Path(folder, ".model-00001-of-00009.safetensors.tmp").touch()  # of a save that was killed
        Path(folder, "config.json").touch()
    running.wait_for_everyone()
    running.save_model(model, folder)


def test_older_shards_and_leftovers_are_removed_and_nothing_else(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(_overwrite, folder=str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def _peak(folder: str, how: str) -> tuple[float, float, float]:
    """MiB of anonymous memory that it takes to get the weights out, and that the largest parameter and all have."""
    import threading

    from tests.engine.small import accelerator

    running = accelerator(zero_stage=3, zero3_save_16bit_model=True)
    config = running.state.deepspeed_plugin.deepspeed_config
    config["train_micro_batch_size_per_gpu"] = 8
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    plain = torch.nn.Sequential(*(torch.nn.Linear(2048, 2048, bias=False) for _ in range(10)))
    model = running.prepare(plain)

    def anonymous() -> int:
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"RssAnon:\s+(\d+)", status)[1])  # type: ignore[index]

    done, seen = threading.Event(), [anonymous()]

    def watch() -> None:
        while not done.wait(0.002):
            seen.append(anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    if how == "save_model":
        running.save_model(model, folder, max_shard_size="100MB")
    else:
        state = running.get_state_dict(model)  # noqa: F841  lives until memory was looked at
    done.set()
    watcher.join()
    largest = 2048 * 2048 * 4 / 2**20
    return (max(seen) - seen[0]) / 1024, largest, 10 * largest


def test_saving_takes_no_more_than_the_largest_parameter(ranks: RankPool, tmp_path: Path) -> None:
    """The model has 160 MiB; two MiB are for everything else."""
    for taken, largest, _ in ranks.run(_peak, folder=str(tmp_path), how="save_model"):
        assert taken <= largest + 2


def test_a_state_dict_is_one_copy_on_rank_0_only(ranks: RankPool, tmp_path: Path) -> None:
    (first, largest, whole), (other, *_) = ranks.run(_peak, folder=str(tmp_path), how="get_state_dict")
    assert first <= whole + largest + 2
    assert other <= largest + 2
