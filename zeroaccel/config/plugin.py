"""`DeepSpeedPlugin`: what the user asked of DeepSpeed, in arguments, a config file, or the launcher's variables."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from zeroaccel.config import checks, environment
from zeroaccel.config.document import HfDeepSpeedConfig
from zeroaccel.config.facts import ResolvedConfig
from zeroaccel.config.precedence import FIELD_KEYS, WITHOUT_KEY, Level, Said, settle, warn_losers
from zeroaccel.config.provenance import Provenance
from zeroaccel.errors import ConfigError, UnsupportedError

AUTO_POLICIES = ("fast", "accelerate")


def _steps(text: str) -> int | str:
    return text if text == "auto" else int(text)


def _clipping(text: str) -> float | str:
    return text if text == "auto" else float(text)


def _flag(text: str) -> bool:
    return environment.parse_bool(text, "it")


# field -> (variable, how its text is read, default)
_LAUNCHER_FIELDS: dict[str, tuple[str, Callable[[str], Any], Any]] = {
    "hf_ds_config": (environment.FIELDS["deepspeed_config_file"], str, "none"),
    "gradient_accumulation_steps": (environment.FIELDS["gradient_accumulation_steps"], _steps, "auto"),
    "gradient_clipping": (environment.FIELDS["gradient_clipping"], _clipping, "auto"),
    "zero_stage": (environment.FIELDS["zero_stage"], int, 2),
    "offload_optimizer_device": (environment.FIELDS["offload_optimizer_device"], str, "none"),
    "offload_param_device": (environment.FIELDS["offload_param_device"], str, "none"),
    "offload_optimizer_nvme_path": (environment.FIELDS["offload_optimizer_nvme_path"], str, "none"),
    "offload_param_nvme_path": (environment.FIELDS["offload_param_nvme_path"], str, "none"),
    "zero3_save_16bit_model": (environment.FIELDS["zero3_save_16bit_model"], environment.is_true, False),
    "zero3_init_flag": (environment.FIELDS["zero3_init_flag"], _flag, None),
    "transformer_moe_cls_names": (environment.FIELDS["deepspeed_moe_layer_cls_names"], str, None),
    "enable_msamp": ("FP8_BACKEND", lambda text: text == "MSAMP", False),
    "msamp_opt_level": ("FP8_OPT_LEVEL", str, "O1"),
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
        self._provenance = Provenance()
        said = {name: self._said(name) for name in _LAUNCHER_FIELDS}
        losers = self._hold("hf_ds_config", said.pop("hf_ds_config"))
        if self.hf_ds_config == "none":
            losers += self._hold_all(said)
            self.hf_ds_config = HfDeepSpeedConfig(self._config_from_fields())
            self.hf_ds_config.origin = "DeepSpeedPlugin"
        else:
            self._read_document()
            asked = {key: settle(key, said[name])[0].value for name, key in FIELD_KEYS.items()}
            self._refuse_ambiguous_fields(asked)
            losers += self._hold_all(said | self._said_by_document(said))
            if self.hf_ds_config.get_value("gradient_accumulation_steps") is None:
                self.hf_ds_config.config["gradient_accumulation_steps"] = self.gradient_accumulation_steps
            for key in asked:
                self.fill_match(key, must_match=False, **asked)
        warn_losers(losers)
        self.hf_ds_config.set_stage_and_offload()
        if self.auto_policy not in AUTO_POLICIES:
            raise ConfigError(f"auto_policy={self.auto_policy!r} is unknown: choose from {list(AUTO_POLICIES)}")
        self.deepspeed_config: dict[str, Any] = self.hf_ds_config.config
        with self._provenance.writing(self.deepspeed_config, "rule", "DeepSpeed's progress lines stay off stdout"):
            self.deepspeed_config["steps_per_print"] = float("inf")
        self._decide_zero3_init()
        self._add_msamp()
        self._provenance.note(self.deepspeed_config)

    # --- construction -------------------------------------------------------------------------------------------

    def _said(self, name: str) -> list[Said]:
        """What argument, launcher and default say about a field."""
        variable, read, default = _LAUNCHER_FIELDS[name]
        said = [Said(default, Level.RULE, "default")]
        if (argument := getattr(self, name)) is not None:
            said.append(Said(argument, Level.PLUGIN, f"DeepSpeedPlugin({name}=...)"))
        if (setting := environment.lookup(variable)) is not None:
            try:
                said.append(Said(read(setting.value), Level.LAUNCHER, setting.variable))
            except ValueError as error:
                raise ConfigError(
                    f"{setting.variable}={setting.value!r} cannot be read as {name}: {error}; correct or unset it"
                ) from error
        return said

    def _said_by_document(self, said: dict[str, list[Said]]) -> dict[str, list[Said]]:
        """The same for the fields about which the document has a number, or nothing at all."""
        found = {}
        for name, key in FIELD_KEYS.items():
            value, source = self.hf_ds_config.get_value(key), self._stated_source(key)
            if value is None:
                value, source = WITHOUT_KEY[key], f"{self._origin} has none"
            if value != "auto":
                found[name] = [*said[name], Said(value, Level.DOCUMENT, source)]
        return found

    def _hold_all(self, said: dict[str, list[Said]]) -> list[str]:
        return [line for name, given in said.items() for line in self._hold(name, given)]

    def _hold(self, name: str, said: list[Said]) -> list[str]:
        """Sets a field to what holds; returns what lost."""
        winner, losers = settle(name, said)
        setattr(self, name, winner.value)
        if name in FIELD_KEYS:
            self._provenance.sources[FIELD_KEYS[name]] = winner.source
        return losers

    def _config_from_fields(self) -> dict[str, Any]:
        return {
            "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "gradient_clipping": self.gradient_clipping,
            "zero_optimization": {
                "stage": self.zero_stage,
                "offload_optimizer": _offload(self.offload_optimizer_device, self.offload_optimizer_nvme_path),
                "offload_param": _offload(self.offload_param_device, self.offload_param_nvme_path),
                "stage3_gather_16bit_weights_on_model_save": self.zero3_save_16bit_model,
            },
        }

    def _read_document(self) -> None:
        if not hasattr(self.hf_ds_config, "find_config_node"):
            self.hf_ds_config = HfDeepSpeedConfig(self.hf_ds_config)
        config = self.hf_ds_config.config
        if problems := checks.sections(config, self._origin):
            raise ConfigError.join(problems)
        if config.get("gradient_clipping") is None:
            config["gradient_clipping"] = "auto"

    def _refuse_ambiguous_fields(self, asked: dict[str, Any]) -> None:
        """Fields of the launch config file that a DeepSpeed config makes ambiguous, unless both say the same."""
        named = environment.text(environment.FIELDS["deepspeed_fields_from_config"]) or ""
        ambiguous = []
        for name in named.split(","):
            key = FIELD_KEYS.get(name)
            if key is not None and self.hf_ds_config.get_value(key, WITHOUT_KEY.get(key)) != asked[key]:
                ambiguous.append(name)
            if name == "mixed_precision" and self._precision() != (environment.text("MIXED_PRECISION") or "no"):
                ambiguous.append(name)
        if ambiguous:
            raise ConfigError(
                f"the launch config file sets {', '.join(ambiguous)} beside deepspeed_config_file ({self._origin}), so"
                " it is not clear which holds: remove them from the launch config file, or write the config anew with"
                " `zeroaccel config`, which asks only for what applies"
            )

    def _precision(self) -> str:
        """The 16-bit type that the document enables, "no", or "auto"."""
        enabled = {name: self.hf_ds_config.get_value(f"{name}.enabled", False) for name in ("fp16", "bf16")}
        if "auto" in enabled.values():
            return "auto"
        return next((name for name, value in enabled.items() if value), "no")

    @property
    def _origin(self) -> str:
        return getattr(self.hf_ds_config, "origin", type(self.hf_ds_config).__name__)

    def _stated_source(self, key: str) -> str:
        document = self.hf_ds_config
        # transformers' and Accelerate's own documents do not know their lines.
        return str(document.source_of(key)) if isinstance(document, HfDeepSpeedConfig) else self._origin

    def _decide_zero3_init(self) -> None:
        stage3 = self.hf_ds_config.is_zero3()
        if self.zero3_init_flag is None:
            self.zero3_init_flag = stage3
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
        with self._provenance.writing(self.deepspeed_config, "enable_msamp"):
            self.deepspeed_config["msamp"] = {"enabled": True, "opt_level": self.msamp_opt_level}

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

    def set_mixed_precision(self, mixed_precision: str, source: str | None = None) -> None:
        """Writes the precision into the config where it leaves it open; fp8 runs on bf16.

        Args:
            mixed_precision: "no", "fp16", "bf16" or "fp8".
            source: who asked for it, for messages and `explain()`; None: nobody did.

        Raises:
            ConfigError: the config enables the other 16-bit type.
        """
        wanted = "bf16" if mixed_precision == "fp8" else mixed_precision
        other = {"fp16": "bf16", "bf16": "fp16"}.get(wanted)
        said = f"mixed_precision={mixed_precision!r}" + (f" ({source})" if source else "")
        if other is not None and self._enables(other):
            raise ConfigError(
                f"{said}, but the DeepSpeed config ({self.source_of(f'{other}.enabled')}) enables {other}: write 'auto'"
                f" for {other}.enabled there, or use mixed_precision={other!r}"
            )
        if mixed_precision == "fp8":
            self._add_msamp()
        config = self.deepspeed_config
        with self._provenance.writing(config, source or "default"):
            if wanted == "fp16":
                config.setdefault("fp16", {"enabled": True, "auto_cast": True})
            elif wanted == "bf16":
                config.setdefault("bf16", {"enabled": True})
            for name in ("fp16", "bf16"):
                config.setdefault(name, {"enabled": False})
                values: dict[str, Any] = {f"{name}.enabled": wanted == name}
                self.fill_match(f"{name}.enabled", must_match=False, **values)
        self._warn_precision(mixed_precision, wanted, said, typed=source is not None)

    def _enables(self, precision: str) -> bool:
        return str(self.get_value(f"{precision}.enabled", False)).lower() == "true"

    def _warn_precision(self, mixed_precision: str, wanted: str, said: str, typed: bool) -> None:
        runs = next((name for name in ("fp16", "bf16") if self._enables(name)), "no")
        if runs != wanted and (typed or wanted != "no"):
            where = self.source_of(f"{wanted if runs == 'no' else runs}.enabled")
            warnings.warn(f"{said} has no effect: the DeepSpeed config ({where}) says {runs!r}", stacklevel=3)
        elif mixed_precision == "fp8":
            warnings.warn(f"{said} trains in bf16: no layer is replaced by an fp8 one", stacklevel=3)

    def set_moe_leaf_modules(self, model: Any) -> None:
        """Makes stage 3 gather mixture-of-experts layers as a whole, where `transformer_moe_cls_names` names them."""
        if self.transformer_moe_cls_names is not None:
            from zeroaccel.engine.zero3 import set_leaf_modules

            set_leaf_modules(model, [name.strip() for name in self.transformer_moe_cls_names.split(",")])

    # --- several plugins, and models born partitioned -----------------------------------------------------------

    def set_deepspeed_weakref(self) -> None:
        """Tells transformers whether to build models partitioned from now on."""
        from zeroaccel.engine.zero3 import announce

        self.dschf = announce(self)

    def is_zero3_init_enabled(self) -> bool:
        """Whether models are built partitioned."""
        return bool(self.zero3_init_flag)

    @contextmanager
    def zero3_init_context_manager(self, enable: bool = False) -> Iterator[None]:
        """Any model built inside is born partitioned at stage 3, or with `enable=False` whole. Collective at stage 3.

        What held before holds again afterwards, also after an exception.

        Raises:
            UsageError: no `Accelerator` has been made with this plugin yet.
        """
        from zeroaccel.engine.zero3 import births

        before, self.zero3_init_flag = self.zero3_init_flag, enable
        try:
            with births(self):
                yield
        finally:
            self.zero3_init_flag = before

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
        """A copy of the config as it was asked for: `"auto"` again where only `prepare()` had put a value."""
        return self._provenance.intent(self.deepspeed_config)

    def source_of(self, key: str) -> str:
        """Where the value of a dotted key comes from, in words."""
        return self._provenance.source_of(key, self.deepspeed_config, self._stated_source)

    def reason_of(self, key: str) -> str:
        """Why a dotted key has its value, where the library chose it before `prepare()`; else empty."""
        return self._provenance.reason_of(key, self.deepspeed_config)

    def adopt(self, resolved: ResolvedConfig) -> None:
        """Shows what `prepare()` resolved, in `deepspeed_config` and in the fields."""
        config = self.deepspeed_config
        self._provenance.note_resolved(config, resolved.config)
        config.clear()
        config.update(copy.deepcopy(resolved.config))
        self.hf_ds_config.config = config
        self.hf_ds_config.set_stage_and_offload()
        for name, key in FIELD_KEYS.items():
            value = self.hf_ds_config.get_value(key)
            setattr(self, name, WITHOUT_KEY.get(key) if value is None else value)


def _offload(device: str, nvme_path: str) -> dict[str, Any]:
    return {"device": device, "nvme_path": nvme_path if device == "nvme" else None}
