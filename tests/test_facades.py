"""Every public name of the installed Accelerate is importable here under the same path, or listed with a reason."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from enum import Enum
from types import ModuleType
from typing import Any

import accelerate
import pytest

from zeroaccel import refused
from zeroaccel.errors import UnsupportedError

# Modules that have no counterpart. A name in them that `accelerate` or `accelerate.utils` shows is in these.
ABSENT_MODULES = {
    "inference": "pipeline-parallel inference",
    "test_utils.examples": "for Accelerate's own examples",
    "utils.ao": "8-bit floats through torchao",
    "utils.bnb": "quantization with bitsandbytes",
    "utils.fsdp_utils": "FSDP",
    "utils.megatron_lm": "Megatron-LM",
    "utils.offload": "big model inference",
    "utils.rich": "importing it changes how all tracebacks look",
    "utils.torch_xla": "XLA",
    "utils.transformer_engine": "8-bit floats through Transformer Engine",
}

# Not compared: their contents are no interface.
NOT_COMPARED = {
    "commands": "the command line has its own tests",
    "test_utils.scripts": "Accelerate's test programs",
}

# Reason -> names that are not even refused (zeroaccel/refused.py).
ABSENT = {
    "layerwise casting": "SUPPORTED_PYTORCH_LAYERS_FOR_UPCASTING",
    "inside of Accelerate's launcher": "test_launch",
    "inside of Accelerate's collectives": "TENSOR_INT_TO_DTYPE TENSOR_TYPE_TO_INT is_torch_xpu_tensor",
    "inside of Accelerate's optimizer and loaders": """
        DataLoaderAdapter additional_kwargs move_to_device patch_optimizer_step v""",
    "Megatron-LM": "MODEL_CONFIGS_TO_MEGATRON_PARSERS",
    "XLA": "ThreadLocalSharedDict",
    "needs files of Accelerate's repository": "mocked_dataloaders mocked_dataloaders_for_autoregressive_models",
}
REASONS = {name: reason for reason, names in ABSENT.items() for name in names.split()}

# What scripts import from a module that only imports it itself.
BORROWED = {
    "accelerator": """
        AcceleratedOptimizer AcceleratedScheduler AcceleratorState AutocastKwargs DataLoaderConfiguration
        DeepSpeedEngineWrapper DeepSpeedPlugin DistributedDataParallelKwargs DistributedType GradScalerKwargs
        GradientAccumulationPlugin GradientState InitProcessGroupKwargs KwargsHandler PartialState PrecisionType
        ProfileKwargs ProjectConfiguration TorchDynamoPlugin""",
    "launchers": "PrepareForLaunch",
}

# Attributes of Accelerate's classes that ours lack, with the reason.
LACKING = {
    "Accelerator": {
        "of parallelism_config, which is refused": """
            context_parallel_rank data_parallel_rank data_parallel_shard_rank pipeline_parallel_rank
            tensor_parallel_rank""",
        "of sequence parallelism": "deepspeed_ulysses_dl_adapter",
    },
    "AcceleratorState": {
        "instances ask PartialState for them (tests/test_state.py)": """
            destroy_process_group fork_launched is_last_process is_local_main_process is_main_process
            local_main_process_first main_process_first print split_between_processes use_distributed
            wait_for_everyone""",
        "FSDP": "is_fsdp2",
    },
    "GradientState": {"XLA": "is_xla_gradients_synced"},
    "DataLoaderDispatcher": {"inside of Accelerate's loaders": "adjust_state_dict_for_prefetch"},
    "DataLoaderShard": {"inside of Accelerate's loaders": "adjust_state_dict_for_prefetch"},
    "SkipDataLoader": {"inside of Accelerate's loaders": "adjust_state_dict_for_prefetch"},
    "DistributedDataParallelKwargs": {"there is no DistributedDataParallel": "register_comm_hook"},
}

# Parameters that ours do not take in the same way, on purpose: reason -> "name(parameter)".
DIFFERENT = {
    "the place of the launch configuration is our own, looked up when called": ["write_basic_config(save_location)"],
    "a mark for `split_batches` left out, which Accelerate moved to DataLoaderConfiguration": [
        "Accelerator(split_batches)"
    ],
    "the device decides: gloo on the CPU": ["InitProcessGroupKwargs(backend)"],
    "other strategies than ZeRO are refused": [
        "AcceleratorState(fsdp_plugin)",
        "AcceleratorState(megatron_lm_plugin)",
        "AcceleratorState(parallelism_config)",
        "AcceleratorState(torch_tp_plugin)",
    ],
    "takes anything in Accelerate, whose decorator hides the parameters": [
        "Accelerator.init_trackers(project_name)",
        "Accelerator.init_trackers(self)",
        "Accelerator.log(self)",
        "Accelerator.log(values)",
    ],
    "of Accelerate's own communication hooks": ["DistributedDataParallelKwargs.to_dict(ignore_keys)"],
    "no plugin is called None": ["AcceleratorState.select_deepspeed_plugin(name)"],
    "no line without points": ["RegressionModel.forward(x)"],
}


def _relative(path: str) -> str:
    return path.removeprefix("accelerate").removeprefix(".")


def _under(path: str, roots: dict[str, str]) -> bool:
    return any(path == root or path.startswith(f"{root}.") for root in roots)


def _paths() -> list[str]:
    """Modules of Accelerate without the first part of their name, "" for the package itself."""
    found = {
        _relative(info.name) for info in pkgutil.walk_packages(accelerate.__path__, "accelerate.", lambda name: None)
    }
    return ["", *sorted(path for path in found if not _under(path, ABSENT_MODULES) and not _under(path, NOT_COMPARED))]


def _module(package: str, path: str) -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(f"{package}.{path}" if path else package)


def _public_names(path: str) -> dict[str, Any]:
    """What a module defines; of a package, also what it takes from its own modules."""
    module = _module("accelerate", path)
    origin = module.__name__

    def belongs(value: Any) -> bool:
        if inspect.isclass(value) or inspect.isroutine(value):
            owner = str(value.__module__)
            return owner == origin or (hasattr(module, "__path__") and owner.startswith("accelerate"))
        return isinstance(value, (str, int, float, list, tuple, dict)) and not isinstance(value, bool)

    # Constants do not say where they come from: what these modules have, others have taken from there.
    homes = [home for home in ("utils.constants", "tracking") if home != path and not hasattr(module, "__path__")]
    constants = {name for home in homes for name in vars(_module("accelerate", home))}
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and belongs(value) and name not in constants
    }


def _ours(path: str, name: str) -> Any:
    return getattr(_module("zeroaccel", path), name)


def _available(path: str, name: str) -> bool:
    try:
        _ours(path, name)
    except (ImportError, AttributeError):
        return False
    return True


PATHS = _paths()


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path or "accelerate")
def test_every_public_name_is_importable_or_listed_as_absent(path: str) -> None:
    names = _public_names(path)
    missing = sorted(name for name in names if not _available(path, name) and name not in REASONS)
    assert not missing, f"write them, or list them with a reason: {' '.join(missing)}"
    there = sorted(name for name in names if _available(path, name) and name in REASONS)
    assert not there, f"available by now, take them out of ABSENT: {' '.join(there)}"


def test_absent_names_exist_in_accelerate() -> None:
    known = {name for path in PATHS for name in _public_names(path)}
    assert sorted(set(REASONS) - known) == []
    assert sum(len(names.split()) for names in ABSENT.values()) == len(REASONS), "a name is listed twice"


@pytest.mark.parametrize("path", ABSENT_MODULES)
def test_absent_modules_exist_in_accelerate_and_not_here(path: str) -> None:
    assert importlib.util.find_spec(f"accelerate.{path}") is not None
    assert importlib.util.find_spec(f"zeroaccel.{path}") is None, "available by now, take it out of ABSENT_MODULES"


@pytest.mark.parametrize(("path", "name"), [(path, name) for path, names in BORROWED.items() for name in names.split()])
def test_names_that_scripts_import_from_where_they_are_only_used(path: str, name: str) -> None:
    assert hasattr(_module("accelerate", path), name)
    assert _available(path, name)


@pytest.mark.parametrize("name", [*refused.CLASSES, *refused.FUNCTIONS])
def test_names_of_other_strategies_import_and_say_at_use_that_they_are_refused(name: str) -> None:
    found = getattr(refused, name)
    assert inspect.isclass(found) is (name in refused.CLASSES)
    with pytest.raises(UnsupportedError, match=f"^{name} is not part of this library: "):
        found("anything", option=1)


def test_what_other_strategies_need_is_not_available() -> None:
    assert not any(getattr(refused, name)() for name in refused.UNAVAILABLE)


def test_a_decorator_of_what_is_refused_lets_the_module_load() -> None:
    @refused.torchao_required
    def convert() -> None: ...

    with pytest.raises(UnsupportedError, match="convert is not part of this library: DeepSpeed trains in bf16"):
        convert()


def test_refused_names_exist_in_accelerate() -> None:
    known = {name for path in [*PATHS, *ABSENT_MODULES] if path != "utils.rich" for name in _public_names(path)}
    assert sorted(set(refused.NAMES) - known) == []


def _parameters(function: Any) -> dict[str, inspect.Parameter]:
    found = inspect.signature(function).parameters
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {name: parameter for name, parameter in found.items() if parameter.kind not in variadic}


def _differences(theirs: Any, ours: Any) -> Iterator[tuple[str, str]]:
    """Parameters of Accelerate's that a call to ours could not pass in the same way, and why."""
    wanted, there = _parameters(theirs), _parameters(ours)
    order = list(there)
    for place, name in enumerate(name for name in wanted if name in there):
        if wanted[name].kind is not inspect.Parameter.KEYWORD_ONLY and order.index(name) != place:
            yield name, f"is in place {order.index(name)} instead of {place}"
    for name, parameter in wanted.items():
        if name not in there:
            yield name, "is missing"
        elif _shown(there[name].default) != _shown(parameter.default):
            yield name, f"defaults to {there[name].default!r} instead of {parameter.default!r}"
    for name, parameter in there.items():
        if name not in wanted and parameter.default is inspect.Parameter.empty:
            yield name, "is new and must be passed"


def _shown(default: Any) -> str:
    return str(default.__name__) if inspect.isfunction(default) else repr(default)


def _callables() -> dict[str, tuple[Any, Any]]:
    """Shared functions, constructors and methods by name."""
    found: dict[str, tuple[Any, Any]] = {}
    for path in PATHS:
        for name, theirs in _public_names(path).items():
            exception = inspect.isclass(theirs) and issubclass(theirs, Exception)
            if not callable(theirs) or name in REASONS or name in refused.NAMES or exception:
                continue
            ours = _ours(path, name)
            found[name] = theirs, ours
            if inspect.isclass(theirs):
                found |= {
                    f"{name}.{method}": (function, getattr(ours, method))
                    for method, function in vars(theirs).items()
                    if not method.startswith("_") and inspect.isfunction(function) and hasattr(ours, method)
                }
    return found


def test_signatures_take_accelerates_parameters_with_the_same_defaults() -> None:
    problems = {
        f"{name}({parameter})": text
        for name, (theirs, ours) in _callables().items()
        for parameter, text in _differences(theirs, ours)
    }
    listed = {place for places in DIFFERENT.values() for place in places}
    assert {place: text for place, text in problems.items() if place not in listed} == {}
    assert sorted(listed - set(problems)) == [], "no difference any more"


def test_classes_have_accelerates_attributes() -> None:
    problems = {
        name: {each for each in dir(theirs) if not each.startswith("_") and not hasattr(ours, each)}
        for name, (theirs, ours) in _callables().items()
        if inspect.isclass(theirs)
    }
    listed = {name: set(" ".join(reasons.values()).split()) for name, reasons in LACKING.items()}
    assert {name: lacking for name, lacking in problems.items() if lacking} == listed


def test_constants_have_accelerates_values() -> None:
    theirs = {name: value for name, value in _public_names("utils.constants").items() if name not in REASONS}
    assert {name: _ours("utils.constants", name) for name in theirs} == theirs


def test_enumerations_have_accelerates_members() -> None:
    shared = [theirs for theirs, _ in _callables().values() if inspect.isclass(theirs) and issubclass(theirs, Enum)]
    assert len(shared) >= 7
    for theirs in shared:
        ours = _ours("utils.dataclasses", theirs.__name__)
        assert {member.name: member.value for member in ours} == {member.name: member.value for member in theirs}


def test_import_prints_nothing_and_loads_neither_torch_nor_deepspeed() -> None:
    program = """
import sys
import zeroaccel, zeroaccel.utils, zeroaccel.optimizer, zeroaccel.scheduler, zeroaccel.memory_utils
from zeroaccel.utils import tqdm
loaded = {name.partition(".")[0] for name in sys.modules} & {"torch", "deepspeed", "numpy", "transformers", "tqdm"}
assert not loaded, loaded
assert callable(tqdm)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_package_shows_its_modules_as_attributes() -> None:
    program = "import zeroaccel; print(zeroaccel.utils.set_seed.__name__, zeroaccel.state.PartialState.__name__)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set_seed PartialState\n"


def test_an_unknown_name_is_an_attribute_error_that_names_it() -> None:
    with pytest.raises(AttributeError, match=r"'zeroaccel\.utils' has no attribute 'no_such_name'"):
        _ours("utils", "no_such_name")


def test_the_progress_bar_stays_a_function_after_its_module_was_imported() -> None:
    importlib.import_module("zeroaccel.utils.tqdm")
    assert callable(_ours("utils", "tqdm"))
