"""`save_state` and `load_state`: folders, what is refused, what a damaged or half-written checkpoint does."""

from __future__ import annotations

import os
import random
import re
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors import safe_open

from tests.checkpoint.resume import Count, Net, Run, Training
from tests.distributed.pool import RankPool
from zeroaccel.checkpoint import manifest
from zeroaccel.errors import CheckpointError, ConfigError, UnsupportedError, UsageError
from zeroaccel.utils import ProjectConfiguration

PLAIN = Run(None, 1)


def numbered(root: Path, **options: Any) -> Training:
    """A run with numbered checkpoints."""
    project = ProjectConfiguration(project_dir=str(root), automatic_checkpoint_naming=True, **options)
    return Training(PLAIN, project_config=project)


def weights(training: Training) -> dict[str, torch.Tensor]:
    return {
        name: tensor.clone() for name, tensor in training.accelerator.unwrap_model(training.model).state_dict().items()
    }


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


# --- numbered folders -------------------------------------------------------------------------------------------------


def test_numbered_checkpoints_are_kept_up_to_the_limit(tmp_path: Path) -> None:
    training = numbered(tmp_path, total_limit=2)
    for number in range(5):
        training.train(1)
        folder = training.accelerator.save_state()
        assert folder == str(tmp_path / "checkpoints" / f"checkpoint_{number}")
        assert training.accelerator.save_iteration == number + 1
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["checkpoint_3", "checkpoint_4"]


def test_without_a_folder_the_newest_complete_checkpoint_is_loaded_and_counted_on(tmp_path: Path) -> None:
    training = numbered(tmp_path)
    for _ in range(3):
        training.train(1)
        training.accelerator.save_state()
    os.remove(tmp_path / "checkpoints" / "checkpoint_2" / manifest.NAME)  # as a kill in its save would leave it
    resumed = numbered(tmp_path)
    resumed.accelerator.load_state()
    assert resumed.count.value == 2
    assert resumed.accelerator.save_iteration == 2
    resumed.accelerator.save_state()
    assert manifest.is_complete(str(tmp_path / "checkpoints" / "checkpoint_2"))


def test_a_numbered_folder_that_is_taken_is_not_overwritten(tmp_path: Path) -> None:
    training = numbered(tmp_path)
    training.accelerator.save_state()
    training.accelerator.project_configuration.iteration = 0
    with pytest.raises(ConfigError, match=r"checkpoint_0 is there already: set ProjectConfiguration\(iteration=...\)"):
        training.accelerator.save_state()
    assert manifest.is_complete(str(tmp_path / "checkpoints" / "checkpoint_0"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a, root: a.save_state(), "save_state needs a folder"),
        (lambda a, root: a.load_state(), "without, name the folder"),
        (lambda a, root: a.load_state(root / "nowhere"), "nowhere' does not exist"),
    ],
    ids=["save", "load", "nowhere"],
)
def test_a_folder_that_is_not_said_or_not_there(tmp_path: Path, call: Callable[..., None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(Training(PLAIN).accelerator, tmp_path)


def test_nothing_to_resume_from(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        numbered(tmp_path).accelerator.load_state()
    with pytest.raises(CheckpointError, match=r"there is no manifest\.json"):
        Training(PLAIN).accelerator.load_state(tmp_path)


# --- one folder -------------------------------------------------------------------------------------------------------


def test_saving_again_replaces_what_was_there_and_cleans_up(tmp_path: Path) -> None:
    training = Training(PLAIN)
    training.accelerator.save_state(tmp_path)
    (tmp_path / "generation-000007").mkdir()  # a killed save
    (tmp_path / "mine.txt").write_text("a hook's")
    training.train(2)
    training.accelerator.save_state(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["generation-000002", manifest.NAME, "mine.txt", "zero_to_fp32.py"]
    kept = weights(training)
    training.train(1)
    training.accelerator.load_state(tmp_path)
    assert same(weights(training), kept)
    assert training.count.value == 2


def test_every_file_is_safe_to_load(tmp_path: Path) -> None:
    training = Training(PLAIN)
    training.train(1)
    training.accelerator.save_state(tmp_path)
    found = manifest.read(str(tmp_path))
    for file in found.files:
        path = found.path(str(tmp_path), file.name)
        if file.name.endswith(".safetensors"):
            with safe_open(path, "pt") as tensors:
                assert "optimizer.exp_avg/first.weight@0" in tensors.keys()  # noqa: SIM118
                assert tensors.get_tensor("weight/frozen.bias@0").shape == (20,)
        else:
            torch.load(path, weights_only=True)


def test_a_flipped_byte_is_found_in_every_file_before_anything_is_loaded(tmp_path: Path) -> None:
    training = Training(PLAIN)
    training.train(1)
    training.accelerator.save_state(tmp_path)
    training.train(1)
    before = weights(training)
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".py"]
    assert len(files) == 5
    for path in files:
        sound = path.read_bytes()
        for place in (0, len(sound) // 2, len(sound) - 1):
            damaged = bytearray(sound)
            damaged[place] ^= 4
            path.write_bytes(bytes(damaged))
            with pytest.raises(CheckpointError, match=re.escape(path.name)):
                training.accelerator.load_state(tmp_path)
        path.write_bytes(sound[:-1])
        assert not manifest.is_complete(str(tmp_path))
        with pytest.raises(CheckpointError, match=re.escape(path.name)):
            training.accelerator.load_state(tmp_path)
        path.write_bytes(sound)
    assert same(weights(training), before)
    assert training.count.value == 2
    training.accelerator.load_state(tmp_path)


# --- trouble on one rank ----------------------------------------------------------------------------------------------


def fail_on_one_rank(folder: str, stage: int) -> list[str]:
    """Saves, then twice in vain: with a full disk on rank 1 only, and into a path that is a file."""
    training = Training(Run(stage, hidden=200))
    accelerator = training.accelerator
    training.train(1)
    accelerator.save_state(folder)
    training.train(1)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits, messages = resource.getrlimit(resource.RLIMIT_FSIZE), []
    if accelerator.process_index == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
    try:
        accelerator.save_state(folder)
    except CheckpointError as error:
        messages.append(str(error))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    try:
        accelerator.save_state(f"{folder}/{manifest.NAME}")
    except CheckpointError as error:
        messages.append(str(error))
    accelerator.load_state(folder)
    assert training.count.value == 1
    messages.append(" ".join(sorted(os.listdir(folder))))
    accelerator.save_state(folder)
    accelerator.free_memory()
    return messages


@pytest.mark.parametrize("stage", [0, 3])
def test_one_rank_in_trouble_is_an_error_on_all_and_the_old_checkpoint_stays(
    ranks: RankPool, tmp_path: Path, stage: int
) -> None:
    folder = str(tmp_path / "checkpoint")
    one, other = ranks.run(fail_on_one_rank, folder=folder, stage=stage, timeout=40)
    assert one == other
    full, unusable, left = one
    assert re.search(r"saving into .* failed\n  rank 1: OSError: .*File too large", full)
    assert re.search(r"rank 0: (NotADirectoryError|FileExistsError)", unusable)
    assert left == "generation-000001 manifest.json zero_to_fp32.py"


# --- registered objects, random states --------------------------------------------------------------------------------


class Holder:
    """Gives any state."""

    def __init__(self, state: Any = None) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


def test_registered_objects_get_back_what_they_gave(tmp_path: Path) -> None:
    state = {
        "numbers": (1, 2.5, None, float("inf")),
        "array": numpy.arange(6, dtype=numpy.float32).reshape(2, 3),
        "single": numpy.float64(3.5),
        "tensor": torch.arange(3),
        7: [{"text": b"bytes"}, {1, 2}],
    }
    training = Training(PLAIN)
    holder = Holder(state)
    training.accelerator.register_for_checkpointing(holder)
    training.accelerator.save_state(tmp_path)
    holder.state = None
    training.accelerator.load_state(tmp_path)
    assert holder.state["numbers"] == state["numbers"]
    assert holder.state[7] == state[7]
    assert numpy.array_equal(holder.state["array"], state["array"])  # type: ignore[arg-type]
    assert holder.state["array"].dtype == numpy.float32
    assert holder.state["single"] == 3.5
    assert torch.equal(holder.state["tensor"], torch.arange(3))


def test_what_could_run_code_when_it_is_loaded_is_not_saved(tmp_path: Path) -> None:
    training = Training(PLAIN)
    training.accelerator.save_state(tmp_path)
    holder = Holder({"inner": [Count()]})
    training.accelerator.register_for_checkpointing(holder)
    with pytest.raises(
        UsageError, match=r"Holder\.state_dict\(\)\['inner'\]\[0\] is a .*Count, which cannot be stored"
    ):
        training.accelerator.save_state(tmp_path)
    assert manifest.is_complete(str(tmp_path))
    with pytest.raises(CheckpointError, match=r"1 registered objects, and 2 are registered \(Count, Holder\)"):
        training.accelerator.load_state(tmp_path)


def test_objects_without_state_dict_cannot_be_registered() -> None:
    with pytest.raises(ValueError, match=r"lacking in:\n  Item at index 1: int\n  Item at index 2: object"):
        Training(PLAIN).accelerator.register_for_checkpointing(Count(), 1, object())


def test_random_states_go_on(tmp_path: Path) -> None:
    training = Training(PLAIN)

    def draw() -> list[float]:
        return [random.random(), float(numpy.random.rand()), float(torch.rand(()))]

    draw()
    training.accelerator.save_state(tmp_path)
    shown = draw()
    assert draw() != shown
    training.accelerator.load_state(tmp_path)
    assert draw() == shown


# --- what does not fit ------------------------------------------------------------------------------------------------


def test_another_model_or_optimizer_is_refused_with_everything_that_differs(tmp_path: Path) -> None:
    training = Training(PLAIN)
    training.train(1)
    training.accelerator.save_state(tmp_path)
    wider = Training(Run(None, 1, hidden=21))
    before = weights(wider)
    with pytest.raises(
        CheckpointError, match=r"first\.weight: its shape is \(20, 24\) in the checkpoint and \(21, 24\)"
    ):
        wider.accelerator.load_state(tmp_path)
    assert same(weights(wider), before)
    other = Training(Run(None, 1, optimizer="SGD"))
    with pytest.raises(CheckpointError, match=r"the optimizer was Adam and is SGD now; .*load_module_only=True"):
        other.accelerator.load_state(tmp_path)
    other.accelerator.load_state(tmp_path, load_module_only=True)
    assert same(weights(other), weights(training))
    assert other.count.value == 0


def test_a_window_whose_gradients_are_final_is_not_saved(tmp_path: Path) -> None:
    training = Training(PLAIN)
    training.accelerator.backward(training.model(torch.ones(2, 24)).sum())
    training.accelerator.clip_grad_norm_(training.model.parameters(), 1.0)
    with pytest.raises(UsageError, match="the gradients of this accumulation window were clipped or unscaled: save"):
        training.accelerator.save_state(tmp_path)


def test_unknown_options_are_refused(tmp_path: Path) -> None:
    accelerator = Training(PLAIN).accelerator
    with pytest.raises(UnsupportedError, match="takes no tag: it takes exclude_frozen_parameters; name the folder"):
        accelerator.save_state(tmp_path, tag="x")
    with pytest.raises(UnsupportedError, match=r"register_for_checkpointing\(object\) instead of client_state"):
        accelerator.save_state(tmp_path, client_state={"epoch": 1})
    accelerator.save_state(tmp_path)
    with pytest.raises(UnsupportedError, match="load_state takes no tag"):
        accelerator.load_state(tmp_path, tag="x")


def test_options_of_accelerates_plain_path_are_taken(tmp_path: Path) -> None:
    training = Training(PLAIN)
    training.accelerator.save_state(tmp_path)
    torch.nn.Module.register_buffer(training.model, "more", torch.ones(1))
    with pytest.raises(CheckpointError, match="the checkpoint lacks more"):
        training.accelerator.load_state(tmp_path, map_location="cpu")
    training.accelerator.load_state(tmp_path, map_location="cpu", strict=False)


# --- options and hooks, on every stage --------------------------------------------------------------------------------


def options_and_hooks(folder: str, stage: int) -> None:
    """All that one engine can show, in one start."""
    from tests.parity.problem import full_weights

    training = Training(Run(stage))
    accelerator, model = training.accelerator, training.model
    training.train(2)
    kept = full_weights(model)

    # Weights only: the optimizer goes on as it was, but from the checkpoint's masters.
    accelerator.save_state(f"{folder}/whole")
    training.train(1)
    accelerator.load_state(f"{folder}/whole", load_module_only=True)
    assert same(full_weights(model), kept)
    assert training.count.value == 3
    rates = [group["lr"] for group in training.optimizer.param_groups]
    accelerator.load_state(f"{folder}/whole", load_optimizer_states=False, load_lr_scheduler_states=False)
    assert rates == [group["lr"] for group in training.optimizer.param_groups]
    assert training.count.value == 2

    accelerator.load_state(f"{folder}/whole")

    # Without frozen parameters those of the run stay.
    accelerator.save_state(f"{folder}/trained", exclude_frozen_parameters=True)
    training.step = 2
    trained = training.train(1)
    model.load_state_dict({"frozen.bias": torch.full((20,), 0.5)}, strict=False)
    accelerator.load_state(f"{folder}/trained")
    found = full_weights(model)
    assert torch.equal(found["frozen.bias"], torch.full((20,), 0.5))
    assert torch.equal(found["first.weight"], kept["first.weight"])
    accelerator.load_state(f"{folder}/whole")
    training.step = 2
    assert training.train(1) == trained

    # A hook that takes everything away loses nothing; what it reads is whole.
    seen: dict[str, Any] = {}

    def before_save(models: list[Any], weights: list[Any], output_dir: str) -> None:
        seen["models"], seen["weights"], seen["folder"] = list(models), dict(weights[0]), output_dir
        models.pop()
        weights.pop()

    handle = accelerator.register_save_state_pre_hook(before_save)
    accelerator.save_state(f"{folder}/hooked")
    handle.remove()
    assert seen["models"] == [model]
    assert seen["folder"] == f"{folder}/hooked"
    if accelerator.is_main_process:
        now = full_weights(model) if stage < 3 else None
        assert seen["weights"]["again.weight"].shape == (20, 20)
        assert now is None or same({name: seen["weights"][name] for name in now}, now)

    # A model that a load hook takes out keeps what the hook loads into it, in the masters too.
    torch.manual_seed(5)
    given = {name: torch.randn(v.shape) if v.is_floating_point() else v for name, v in Net(20).state_dict().items()}
    given["again.weight"] = given["tied.weight"]

    def before_load(models: list[Any], input_dir: str) -> None:
        taken = models.pop()
        assert taken.load_state_dict(given) == ([], [])

    handle = accelerator.register_load_state_pre_hook(before_load)
    accelerator.load_state(f"{folder}/hooked")
    handle.remove()
    found = full_weights(model)
    assert same(found, {name: given[name] for name in found})
    for group in training.optimizer.param_groups:
        group["lr"] = 0.0
        group["weight_decay"] = 0.0
    training.train(1)  # writes the weights anew, from the masters
    assert same(full_weights(model), found)
    accelerator.free_memory()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_options_and_hooks(ranks: RankPool, tmp_path: Path, stage: int) -> None:
    ranks.run(options_and_hooks, folder=str(tmp_path), stage=stage)
