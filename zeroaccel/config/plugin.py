"""`DeepSpeedPlugin`: what the user asked of DeepSpeed, in arguments, a config file, or the launcher's variables."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from zeroaccel.config import environment
from zeroaccel.config.document import HfDeepSpeedConfig
from zeroaccel.config.precedence import ARGUMENT, DEFAULT, FIELD_KEYS, MISSING_STEPS, Source, losers_warning
from zeroaccel.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from zeroaccel.config.auto import ResolvedConfig

AUTO_POLICIES = ("fast", "accelerate")


def _steps(text: str) -> int | str:
    return int(text) if text.isdigit() else text


def _clipping(text: str) -> float | str:
    return text if text == "auto" else float(text)


# field -> (variable, how its text is read, default)
_LAUNCHER_FIELDS: dict[str, tuple[str, Any, Any]] = {
    "gradient_accumulation_steps": (environment.FIELDS["gradient_accumulation_steps"], _steps, "auto"),
    "gradient_clipping": (environment.FIELDS["gradient_clipping"], _clipping, "auto"),
    "zero_stage": (environment.FIELDS["zero_stage"], int, 2),
    "offload_optimizer_device": (environment.FIELDS["offload_optimizer_device"], str, "none"),
    "offload_param_device": (environment.FIELDS["offload_param_device"], str, "none"),
    "offload_optimizer_nvme_path": (environment.FIELDS["offload_optimizer_nvme_path"], str, "none"),
    "offload_param_nvme_path": (environment.FIELDS["offload_param_nvme_path"], str, "none"),
    "zero3_save_16bit_model": (environment.FIELDS["zero3_save_16bit_model"], environment.is_true, False),
    "enable_msamp": ("FP8_BACKEND", lambda text: text == "MSAMP", False),
    "msamp_opt_level": ("FP8_OPT_LEVEL", str, "O1"),
    "hf_ds_config": (environment.FIELDS["deepspeed_config_file"], str, "none"),
    "auto_policy": (environment.FIELDS["auto_policy"], str, "fast"),
}


@dataclass
class DeepSpeedPlugin:
    """What to ask of DeepSpeed. A field that is None comes from the launcher's variable, else its default.

    Args:
        hf_ds_config: DeepSpeed config: path, dictionary, JSON text, base64, or an `HfDeepSpeedConfig`.
        gradient_accumulation_steps: micro-batches of an optimizer step; default: what the `Accelerator` says.
        gradient_clipping: norm to clip to, 0 for none; default: none.
        zero_stage: 0 to 3; default 2.
        is_train_batch_min: the smallest training loader decides the micro-batch size; False: the largest loader.
        offload_optimizer_device: "none", "cpu" or "nvme".
        offload_param_device: "none", "cpu" or "nvme"; stage 3.
        offload_optimizer_nvme_path, offload_param_nvme_path: folder on the disk, for "nvme".
        zero3_init_flag: build models partitioned; default: at stage 3.
        zero3_save_16bit_model: gather 16-bit weights when saving; stage 3.
        transformer_moe_cls_names: comma-separated names of mixture-of-experts layers.
        enable_msamp, msamp_opt_level: MS-AMP's fp8.
        auto_policy: "fast" fills `auto` bucket sizes for speed, "accelerate" with Accelerate's numbers.
        cast_inputs: cast floating-point inputs of a bf16 model.

    Attributes:
        deepspeed_config: the config as a dictionary; change it before `prepare()`.
        hf_ds_config: the same as an `HfDeepSpeedConfig`.
        selected: whether the next `prepare()` uses this plugin.

    Raises:
        ConfigError: no `zero_optimization` in the config, values that contradict each other or cannot be.
    """

    hf_ds_config: Any = None
    gradient_accumulation_steps: Any = None
    gradient_clipping: Any = None
    zero_stage: Any = None
    is_train_batch_min: bool = True
    offload_optimizer_device: Any = None
    offload_param_device: Any = None
    offload_optimizer_nvme_path: Any = None
    offload_param_nvme_path: Any = None
    zero3_init_flag: Any = None
    zero3_save_16bit_model: Any = None
    transformer_moe_cls_names: str | None = None
    enable_msamp: Any = None
    msamp_opt_level: Any = None
    auto_policy: Any = field(default=None, kw_only=True)
    cast_inputs: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        self.dschf: object | None = None
        self._selected = False
        self._sources: dict[str, Source] = {}
        self._was_auto: dict[str, Any] = {}  # what the newest prepare() put where `auto` stood
        self._fill_from_launcher()
        if self.auto_policy not in AUTO_POLICIES:
            raise ConfigError(f"auto_policy={self.auto_policy!r} is unknown: choose from {list(AUTO_POLICIES)}")
        if self.hf_ds_config == "none":
            self.hf_ds_config = HfDeepSpeedConfig(self._config_from_fields())
        else:
            self._adopt_document()
        self.deepspeed_config: dict[str, Any] = self.hf_ds_config.config
        self.deepspeed_config["steps_per_print"] = float("inf")  # DeepSpeed's progress lines are not for stdout
        self._decide_zero3_init()
        self._add_msamp()

    # --- construction -------------------------------------------------------------------------------------------

    def _fill_from_launcher(self) -> None:
        for name, (variable, read, default) in _LAUNCHER_FIELDS.items():
            if getattr(self, name) is not None:
                self._sources[name] = ARGUMENT
                continue
            setting = environment.lookup(variable)
            self._sources[name] = DEFAULT if setting is None else Source(setting.variable, typed=True)
            try:
                setattr(self, name, default if setting is None else read(setting.value))
            except ValueError as error:
                assert setting is not None
                raise ConfigError(f"{setting.variable}={setting.value!r} cannot be read as {name}: {error}") from error

    def _config_from_fields(self) -> dict[str, Any]:
        config: dict[str, Any] = {
            "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "zero_optimization": {
                "stage": self.zero_stage,
                "offload_optimizer": _offload(self.offload_optimizer_device, self.offload_optimizer_nvme_path),
                "offload_param": _offload(self.offload_param_device, self.offload_param_nvme_path),
                "stage3_gather_16bit_weights_on_model_save": self.zero3_save_16bit_model,
            },
        }
        if self.gradient_clipping:  # 0 is DeepSpeed's own default
            config["gradient_clipping"] = self.gradient_clipping
        return config

    def _adopt_document(self) -> None:
        if not hasattr(self.hf_ds_config, "find_config_node"):
            self.hf_ds_config = HfDeepSpeedConfig(self.hf_ds_config)
        config = self.hf_ds_config.config
        if "gradient_accumulation_steps" not in config:
            config["gradient_accumulation_steps"] = MISSING_STEPS
        if "zero_optimization" not in config:
            raise ConfigError(
                f"the DeepSpeed config ({self._origin}) has no zero_optimization section: add one, e.g."
                ' "zero_optimization": {"stage": 2}'
            )
        self._deepspeed_config_checks()
        asked = {key: getattr(self, name) for name, key in FIELD_KEYS.items()}
        for key in asked:
            self.fill_match(key, must_match=False, **asked)
        self.hf_ds_config.set_stage_and_offload()
        self._follow_document(asked)

    def _follow_document(self, asked: dict[str, Any]) -> None:
        """A number in the document beats the field, which then shows it."""
        losers = []
        for name, key in FIELD_KEYS.items():
            value = self.hf_ds_config.get_value(key)
            if value is None or value == "auto":
                continue
            if self._sources[name].typed and asked[key] not in (value, "auto"):
                losers.append((key, value, self._origin, asked[key], self._sources[name].shown(name)))
            if asked[key] != value:
                self._sources[name] = Source(self._origin, typed=True)
            setattr(self, name, value)
        if losers:
            warnings.warn(losers_warning(losers), stacklevel=5)

    @property
    def _origin(self) -> str:
        return getattr(self.hf_ds_config, "origin", type(self.hf_ds_config).__name__)

    def _decide_zero3_init(self) -> None:
        stage3 = self.hf_ds_config.is_zero3()
        if self.zero3_init_flag is None:
            self.zero3_init_flag = environment.flag(environment.FIELDS["zero3_init_flag"], default=stage3)
        if self.zero3_init_flag and not stage3:
            warnings.warn("zero3_init_flag works at ZeRO stage 3 only: it is switched off", stacklevel=4)
            self.zero3_init_flag = False

    def _add_msamp(self) -> None:
        if not self.enable_msamp or "msamp" in self.deepspeed_config:
            return
        if self.zero_stage == 3:
            raise UnsupportedError("MS-AMP does not work at ZeRO stage 3: use stage 0, 1 or 2")
        if self.msamp_opt_level not in ("O1", "O2"):
            raise ConfigError(f"msamp_opt_level={self.msamp_opt_level!r} is unknown: use 'O1' or 'O2'")
        self.deepspeed_config["msamp"] = {"enabled": True, "opt_level": self.msamp_opt_level}

    def _deepspeed_config_checks(self) -> None:
        """Fields of the YAML file that a DeepSpeed config file makes ambiguous, unless they say the same."""
        named = environment.text(environment.FIELDS["deepspeed_fields_from_config"])
        ambiguous = []
        for name in filter(None, (named or "").split(",")):
            key = FIELD_KEYS.get(name)
            if name == "mixed_precision" or (key and self.hf_ds_config.get_value(key) != getattr(self, name)):
                ambiguous.append(name)
        if ambiguous:
            raise ConfigError(
                f"the launch config file sets {', '.join(ambiguous)} beside deepspeed_config_file ({self._origin}), so"
                " it is not clear which holds: remove them from the launch config file, or write the config anew with"
                " `zeroaccel config`, which asks only for what applies"
            )

    # --- questions and changes ----------------------------------------------------------------------------------

    def is_auto(self, ds_key_long: str) -> bool:
        """Whether a dotted key of the config is `"auto"`."""
        return bool(self.get_value(ds_key_long) == "auto")

    def get_value(self, ds_key_long: str, default: Any = None) -> Any:
        """Value of a dotted key of the config."""
        return self.hf_ds_config.get_value(ds_key_long, default)

    def fill_match(
        self, ds_key_long: str, mismatches: list[str] | None = None, must_match: bool = True, **kwargs: Any
    ) -> None:
        """Fills one dotted key with its value in `kwargs` if it is `"auto"`, else compares the two.

        Args:
            ds_key_long: dotted key; nothing happens where its section is missing.
            mismatches: gets a line for each difference.
            must_match: False does not compare.
            kwargs: values by dotted key.

        Raises:
            ConfigError: the key is `"auto"` and has no value in `kwargs`.
        """
        node, key = self.hf_ds_config.find_config_node(ds_key_long)
        if node is None:
            return
        if node.get(key) == "auto":
            if ds_key_long not in kwargs:
                raise ConfigError(
                    f"{ds_key_long} is 'auto' in the DeepSpeed config and nothing says what it shall be: write a value"
                    f" there, or pass `{ds_key_long}` in kwargs"
                )
            node[key] = kwargs[ds_key_long]
        elif must_match and ds_key_long in kwargs and node.get(key) not in (None, kwargs[ds_key_long]):
            difference = f"{ds_key_long} is {node[key]!r} in the config and {kwargs[ds_key_long]!r} here"
            (mismatches if mismatches is not None else []).append(difference)

    def deepspeed_config_process(
        self,
        prefix: str = "",
        mismatches: list[str] | None = None,
        config: dict[str, Any] | None = None,
        must_match: bool = True,
        **kwargs: Any,
    ) -> None:
        """Fills all `"auto"` values of the config from `kwargs`, and compares the others.

        Raises:
            ConfigError: an `"auto"` without value, or values that differ, all named at once.
        """
        mismatches = [] if mismatches is None else mismatches
        for key, value in list((self.deepspeed_config if config is None else config).items()):
            if isinstance(value, dict):
                self.deepspeed_config_process(f"{prefix}{key}.", mismatches, value, must_match, **kwargs)
            else:
                self.fill_match(prefix + key, mismatches, must_match=must_match, **kwargs)
        if mismatches and not prefix:
            raise ConfigError(f"{'; '.join(mismatches)}: make them equal, or write 'auto' in the DeepSpeed config")

    def set_mixed_precision(self, mixed_precision: str) -> None:
        """Writes the precision into the config where it leaves it open; fp8 runs on bf16.

        Raises:
            ConfigError: the config enables the other 16-bit type.
        """
        wanted = "bf16" if mixed_precision == "fp8" else mixed_precision
        config = self.deepspeed_config
        other = {"fp16": "bf16", "bf16": "fp16"}.get(wanted)
        if other is not None and str(config.get(other, {}).get("enabled", "False")).lower() == "true":
            raise ConfigError(
                f"mixed_precision={mixed_precision!r}, but the DeepSpeed config ({self._origin}) enables {other}:"
                f" write 'auto' for {other}.enabled there, or use mixed_precision={other!r}"
            )
        if wanted == "fp16":
            config.setdefault("fp16", {"enabled": True, "auto_cast": True})
        elif wanted == "bf16":
            config.setdefault("bf16", {"enabled": True})
        if mixed_precision == "fp8" and self.enable_msamp:
            config.setdefault("msamp", {"enabled": True, "opt_level": self.msamp_opt_level})
        for name in ("fp16", "bf16"):
            config.setdefault(name, {"enabled": False})
            values: dict[str, Any] = {f"{name}.enabled": wanted == name}
            self.fill_match(f"{name}.enabled", must_match=False, **values)
        if other is not None and config[wanted].get("enabled") is False:
            warnings.warn(
                f"mixed_precision={mixed_precision!r} has no effect: the DeepSpeed config ({self._origin}) switches"
                f" {wanted} off",
                stacklevel=2,
            )

    def set_moe_leaf_modules(self, model: Any) -> None:
        """Makes stage 3 gather mixture-of-experts layers as a whole, where `transformer_moe_cls_names` names them."""
        if self.transformer_moe_cls_names is None:
            self.transformer_moe_cls_names = environment.text(environment.FIELDS["deepspeed_moe_layer_cls_names"])
        if self.transformer_moe_cls_names is not None:
            from zeroaccel.engine.zero3 import set_leaf_modules

            set_leaf_modules(model, [name.strip() for name in self.transformer_moe_cls_names.split(",")])

    # --- several plugins, and models born partitioned -----------------------------------------------------------

    def set_deepspeed_weakref(self) -> None:
        """Tells transformers whether to build models partitioned from now on."""
        from zeroaccel.engine.zero3 import register_with_transformers

        self.dschf = register_with_transformers(copy.deepcopy(self.deepspeed_config), bool(self.zero3_init_flag))

    def is_zero3_init_enabled(self) -> bool:
        """Whether models are built partitioned."""
        return bool(self.zero3_init_flag)

    @contextmanager
    def zero3_init_context_manager(self, enable: bool = False) -> Iterator[None]:
        """Models built inside are partitioned, or with `enable=False` are not; restored also after an exception."""
        before = self.zero3_init_flag
        if bool(before) == enable:
            yield
            return
        try:
            self.zero3_init_flag = enable
            self.set_deepspeed_weakref()
            yield
        finally:
            self.zero3_init_flag = before
            self.set_deepspeed_weakref()

    def select(self, _from_accelerator_state: bool = False) -> None:
        """What `AcceleratorState().select_deepspeed_plugin(name)` calls.

        Raises:
            ConfigError: called directly, which would leave the other plugins selected.
        """
        if not _from_accelerator_state:
            raise ConfigError("select a plugin with `accelerator.state.select_deepspeed_plugin(name)`")
        self.set_deepspeed_weakref()
        self._set_selected(True)

    def _unselect(self) -> None:
        self._set_selected(False)

    def _set_selected(self, value: bool) -> None:
        self._selected = value

    @property
    def selected(self) -> bool:
        """Whether the next `prepare()` uses this plugin."""
        return self._selected

    @selected.setter
    def selected(self, value: bool) -> None:
        raise UnsupportedError("select a plugin with `accelerator.state.select_deepspeed_plugin(name)`")

    # --- prepare ------------------------------------------------------------------------------------------------

    def intent(self) -> dict[str, Any]:
        """A copy of the config with `"auto"` where only the newest `prepare()` had put a value."""
        config = HfDeepSpeedConfig(self.deepspeed_config)
        for key, value in self._was_auto.items():
            node, name = config.find_config_node(key)
            if node is not None and node.get(name) == value:
                node[name] = "auto"
        return config.config

    def source_of(self, key: str) -> str:
        """Where the value of a dotted key comes from, in words."""
        name = next((name for name, known in FIELD_KEYS.items() if known == key), None)
        if name is not None and name in self._sources:
            return self._sources[name].shown(name)
        return self._origin

    def adopt(self, resolved: ResolvedConfig) -> None:
        """Shows what `prepare()` resolved, in `deepspeed_config` and in the fields."""
        self._was_auto = {entry.key: entry.value for entry in resolved.entries if entry.was_auto}
        config = self.deepspeed_config
        config.clear()
        config.update(copy.deepcopy(resolved.config))
        self.hf_ds_config.config = config
        self.hf_ds_config.set_stage_and_offload()
        for name, key in FIELD_KEYS.items():
            value = self.hf_ds_config.get_value(key)
            if value is not None:
                setattr(self, name, value)


def _offload(device: str, nvme_path: str) -> dict[str, Any]:
    return {"device": device, "nvme_path": nvme_path if device == "nvme" else None}
