"""Which packages are installed, in which versions. Nothing is imported to find out."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import operator
import sys
from collections.abc import Callable

from packaging.version import Version, parse

from zeroaccel.config import environment
from zeroaccel.errors import ConfigError

STR_OPERATION_TO_FUNC: dict[str, Callable[[Version, Version], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    "<": operator.lt,
}


def compare_versions(library_or_version: str | Version, operation: str, requirement_version: str) -> bool:
    """Whether a version stands in this relation to another one.

    Args:
        library_or_version: an installed distribution's name, or a version.
        operation: ">", ">=", "==", "!=", "<=" or "<".
        requirement_version: the version on the right.

    Raises:
        ConfigError: another operation.
        PackageNotFoundError: the distribution is not installed.
    """
    if operation not in STR_OPERATION_TO_FUNC:
        raise ConfigError(f"operation {operation!r} is unknown: write one of {', '.join(STR_OPERATION_TO_FUNC)}")
    version = library_or_version
    if isinstance(version, str):
        version = parse(importlib.metadata.version(version))
    return STR_OPERATION_TO_FUNC[operation](version, parse(requirement_version))


def is_torch_version(operation: str, version: str) -> bool:
    """Whether PyTorch's version stands in this relation to `version`."""
    return compare_versions("torch", operation, version)


def installed_version(module: str, *distributions: str) -> Version | None:
    """Version of a module that can be imported, None where it cannot.

    A folder of the same name on the path does not count: the module must belong to an installed distribution.

    Args:
        module: top-level module.
        distributions: distributions that may bring it; default: one of the module's name.
    """
    if importlib.util.find_spec(module) is None:
        return None
    for distribution in distributions or (module,):
        try:
            return parse(importlib.metadata.version(distribution))
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def are_libraries_initialized(*library_names: str) -> list[str]:
    """Those of these modules that are imported already."""
    return [name for name in library_names if name in sys.modules]


def _installed(module: str, *distributions: str, requirement: tuple[str, str] | None = None) -> Callable[[], bool]:
    """A function that tells whether a package is installed, in a version that fits the requirement."""

    def is_available() -> bool:
        version = installed_version(module, *distributions)
        return version is not None and (requirement is None or compare_versions(version, *requirement))

    is_available.__doc__ = f"Whether {module} is installed" + (f", {' '.join(requirement)}." if requirement else ".")
    return is_available


is_4bit_bnb_available = _installed("bitsandbytes", requirement=(">=", "0.39.0"))
is_8bit_bnb_available = _installed("bitsandbytes", requirement=(">=", "0.37.2"))
is_aim_available = _installed("aim", requirement=("<", "4.0.0"))
is_amdsmi_available = _installed("amdsmi")
is_boto3_available = _installed("boto3")
is_clearml_available = _installed("clearml")
is_comet_ml_available = _installed("comet_ml")
is_datasets_available = _installed("datasets")
is_deepspeed_available = _installed("deepspeed")
is_dvclive_available = _installed("dvclive")
is_import_timer_available = _installed("import_timer")
is_lomo_available = _installed("lomo_optim")
is_matplotlib_available = _installed("matplotlib")
is_mlflow_available = _installed("mlflow", "mlflow", "mlflow-skinny")
is_msamp_available = _installed("msamp", "ms-amp")
is_pandas_available = _installed("pandas")
is_peft_available = _installed("peft")
is_pynvml_available = _installed("pynvml", "pynvml", "nvidia-ml-py")
is_pytest_available = _installed("pytest")
is_schedulefree_available = _installed("schedulefree")
is_swanlab_available = _installed("swanlab")
is_timm_available = _installed("timm")
is_torchao_available = _installed("torchao", requirement=(">=", "0.6.1"))
is_torchdata_available = _installed("torchdata")
is_torchdata_stateful_dataloader_available = _installed("torchdata", requirement=(">=", "0.8.0"))
is_torchvision_available = _installed("torchvision")
is_tqdm_available = _installed("tqdm")
is_trackio_available = _installed("trackio")
is_transformer_engine_available = _installed("transformer_engine", "transformer-engine")
is_transformers_available = _installed("transformers")
is_triton_available = _installed("triton", "triton", "triton-xpu")
is_wandb_available = _installed("wandb")
is_weights_only_available = _installed("torch", requirement=(">=", "2.4.0"))


def is_bnb_available(min_version: str | None = None) -> bool:
    """Whether bitsandbytes is installed, at least in this version."""
    version = installed_version("bitsandbytes")
    return version is not None and (min_version is None or compare_versions(version, ">=", min_version))


def is_numpy_available(min_version: str = "1.25.0") -> bool:
    """Whether NumPy is installed, at least in this version."""
    return compare_versions("numpy", ">=", min_version)


def is_rich_available() -> bool:
    """Whether rich is installed, and wanted by `ZEROACCEL_ENABLE_RICH`."""
    return installed_version("rich") is not None and environment.flag("ENABLE_RICH")


def is_tensorboard_available() -> bool:
    """Whether TensorBoard is installed, or tensorboardX."""
    return installed_version("tensorboard") is not None or installed_version("tensorboardX") is not None


def is_fp8_available() -> bool:
    """Whether a library for 8-bit floats is installed: Transformer Engine, MS-AMP or torchao."""
    return is_transformer_engine_available() or is_msamp_available() or is_torchao_available()
