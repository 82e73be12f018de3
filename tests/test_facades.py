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

# Modules that have no counterpart. A name in them that `accelerate` or `accelerate.utils` shows, too, is in ABSENT.
ABSENT_MODULES = {
    "big_modeling": "big model inference",
    "hooks": "big model inference",
    "inference": "pipeline-parallel inference",
    "local_sgd": "local SGD averages weights, ZeRO splits them",
    "parallelism_config": "other kinds of parallelism",
    "test_utils.examples": "for Accelerate's own examples",
    "utils.ao": "8-bit floats through torchao",
    "utils.bnb": "quantization with bitsandbytes",
    "utils.fsdp_utils": "FSDP",
    "utils.megatron_lm": "Megatron-LM",
    "utils.offload": "big model inference",
    "utils.rich": "later: tracebacks by rich",
    "utils.torch_xla": "XLA",
    "utils.transformer_engine": "8-bit floats through Transformer Engine",
}

# Not compared: their contents are no interface.
NOT_COMPARED = {
    "commands": "the command line has its own tests",
    "test_utils.scripts": "Accelerate's test programs",
}

# Reason -> names.
ABSENT = {
    "big model inference": """
        CustomDtype OffloadedWeightsLoader PrefixedDataset align_module_device check_device_map check_device_same
        check_tied_parameters_in_config check_tied_parameters_on_same_device clean_device_map
        compute_module_total_buffer_size cpu_offload cpu_offload_with_hook disk_offload dispatch_model
        extract_submodules_state_dict fallback_allocate get_balanced_memory get_max_memory get_module_leaves
        get_module_size_with_ties get_state_dict_from_offload get_state_dict_offloaded_model has_offloaded_params
        infer_auto_device_map init_empty_weights init_on_device load_checkpoint_and_dispatch load_offloaded_weight
        load_offloaded_weights offload_state_dict offload_weight save_offload_index set_module_tensor_to_device""",
    "layerwise casting": "SUPPORTED_PYTORCH_LAYERS_FOR_UPCASTING",
    "pipeline-parallel inference": "prepare_pippy is_pippy_available require_pippy",
    "later: compilation": "compile_regions compile_regions_deepspeed has_repeated_blocks is_repeated_blocks",
    "the launcher pins ranks to cores: --enable_cpu_affinity": """
        CPUInformation get_cpu_distributed_information override_numa_affinity set_numa_affinity""",
    "later: sequence parallelism": "BETA_SP_AVAILABLE_DEEPSPEED_VERSION DeepSpeedSequenceParallelConfig",
    "inside of Accelerate's launcher": """
        env_var_path_add prepare_deepspeed_cmd_env prepare_extend_env_parallelism_config prepare_multi_gpu_env
        prepare_simple_launcher_cmd_env TORCH_LAUNCH_PARAMS ELASTIC_LOG_LINE_PREFIX_TEMPLATE_PYTORCH_VERSION
        test_launch""",
    "work-around for old drivers": "check_cuda_p2p_ib_support get_driver_version get_gpu_info",
    "inside of Accelerate's collectives, where a mismatch is looked for in debug mode only": """
        DistributedOperationException TENSOR_INT_TO_DTYPE TENSOR_TYPE_TO_INT chained_operation gather_tensor_shape
        get_shape is_torch_xpu_tensor verify_operation""",
    "inside of Accelerate's optimizer and loaders": """
        DataLoaderAdapter additional_kwargs move_to_device patch_optimizer_step v""",
    "inside of Accelerate's plain path: use `accelerator.autocast()` and `accelerator.scaler`": """
        get_grad_scaler get_mixed_precision_context_manager""",
    "base classes and lower bounds that only Accelerate itself needs": """
        BaseEnum EnumWithContains MITA_PROFILING_AVAILABLE_PYTORCH_VERSION
        XPU_PROFILING_AVAILABLE_PYTORCH_VERSION""",
    "8-bit floats: DeepSpeed runs bf16": """
        AORecipeKwargs FP8BackendType FP8RecipeKwargs MSAMPRecipeKwargs TERecipeKwargs apply_fp8_autowrap
        contextual_fp8_autocast convert_model convert_model_to_fp8_ao filter_first_and_last_linear_layers has_ao_layers
        has_transformer_engine_layers is_transformer_engine_mxfp8_available require_transformer_engine_mxfp8
        setup_fp8_env torchao_required""",
    "quantization with bitsandbytes": """
        BnbQuantizationConfig has_4bit_bnb_layers is_bitsandbytes_multi_backend_available load_and_quantize_model""",
    "FSDP": """
        FSDP2_PYTORCH_VERSION FSDP2_STATE_DICT_TYPE FSDP_AUTO_WRAP_POLICY FSDP_BACKWARD_PREFETCH FSDP_MODEL_NAME
        FSDP_PYTORCH_VERSION FSDP_SHARDING_STRATEGY FSDP_STATE_DICT_TYPE FullyShardedDataParallelPlugin
        compile_regions_fsdp2 disable_fsdp_ram_efficient_loading enable_fsdp_ram_efficient_loading
        ensure_weights_retied fsdp2_apply_ac fsdp2_canonicalize_names fsdp2_load_full_state_dict fsdp2_prepare_model
        fsdp2_switch_optimizer_parameters get_fsdp2_grad_scaler get_module_class_from_name load_fsdp_model
        load_fsdp_optimizer merge_fsdp_weights require_fsdp2 save_fsdp_model save_fsdp_optimizer""",
    "other kinds of parallelism": """
        BETA_CP_AVAILABLE_PYTORCH_VERSION BETA_TP_AVAILABLE_PYTORCH_VERSION BETA_TP_AVAILABLE_TRANSFORMERS_VERSION
        DTENSOR_PYTORCH_VERSION ParallelismConfig TorchContextParallelConfig TorchTensorParallelConfig
        TorchTensorParallelPlugin get_model_tp_size model_has_dtensor require_tp""",
    "Megatron-LM": """
        AbstractTrainStep BertTrainStep GPTTrainStep MODEL_CONFIGS_TO_MEGATRON_PARSERS MegatronLMDummyDataLoader
        MegatronLMDummyScheduler MegatronLMPlugin T5TrainStep add_model_config_to_megatron_parser
        avg_losses_across_data_parallel_group is_megatron_lm_available parse_bert_config parse_glm4_moe_config
        parse_gpt2_config parse_llama_config parse_t5_config""",
    "SageMaker": """
        SAGEMAKER_PARALLEL_EC2_INSTANCES SAGEMAKER_PYTHON_VERSION SAGEMAKER_PYTORCH_VERSION
        SAGEMAKER_TRANSFORMERS_VERSION SageMakerDistributedType is_sagemaker_available prepare_sagemager_args_inputs""",
    "XLA": "ThreadLocalSharedDict install_xla prepare_tpu",
    "Gaudi 1": "is_habana_gaudi1",
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
            if not callable(theirs) or name in REASONS or exception:
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
