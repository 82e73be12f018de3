"""What the run was configured to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from zeroaccel.config.precedence import Level, Said, choose_mixed_precision
from zeroaccel.config.types import DistributedType, PrecisionType
from zeroaccel.errors import ConfigError
from zeroaccel.state.process import PartialState
from zeroaccel.state.shared import Shared

if TYPE_CHECKING:
    from zeroaccel.config.plugin import DeepSpeedPlugin


class AcceleratorState(Shared):
    """What the run was configured to, on top of `PartialState`, whose attributes it shows too.

    Made by `Accelerator`; scripts read it anywhere afterwards.

    Raises:
        ConfigError: made before any `Accelerator`, or asked for something else than the first one was.
    """

    _shared_state: ClassVar[dict[str, Any]] = {}
    deepspeed_plugins: DeepSpeedPlugin | dict[str, DeepSpeedPlugin] | None
    distributed_type: DistributedType
    _mixed_precision: str

    def __init__(
        self,
        mixed_precision: str | None = None,
        cpu: bool = False,
        dynamo_plugin: Any = None,
        deepspeed_plugin: DeepSpeedPlugin | dict[str, DeepSpeedPlugin] | None = None,
        _from_accelerator: bool = False,
        **kwargs: Any,
    ) -> None:
        self.__dict__ = self._shared_state
        if self.initialized:
            self._refuse_change(mixed_precision, cpu)
            return
        if not _from_accelerator:
            raise ConfigError("AcceleratorState is empty: create `accelerator = Accelerator()` before reading it")
        partial_state = PartialState(cpu, **kwargs)
        try:
            self._configure(partial_state, mixed_precision, deepspeed_plugin, dynamo_plugin)
        except BaseException:  # half a state would pass for a whole one
            self._shared_state.clear()
            raise

    def _configure(
        self,
        partial_state: PartialState,
        mixed_precision: str | None,
        deepspeed_plugin: DeepSpeedPlugin | dict[str, DeepSpeedPlugin] | None,
        dynamo_plugin: Any,
    ) -> None:
        self.__dict__.update(PartialState._shared_state)
        self.deepspeed_plugins = None
        self.dynamo_plugin = dynamo_plugin
        precision = choose_mixed_precision(mixed_precision)
        if deepspeed_plugin is None:
            self._mixed_precision = precision.value
        else:
            self._enable_deepspeed(partial_state, deepspeed_plugin, precision)
        PartialState._shared_state["distributed_type"] = self.distributed_type

    def _enable_deepspeed(
        self,
        partial_state: PartialState,
        plugins: DeepSpeedPlugin | dict[str, DeepSpeedPlugin],
        precision: Said,
    ) -> None:
        self._mixed_precision = "fp8" if precision.value == "fp8" else "no"  # else read from the plugin's config
        source = None if precision.level is Level.RULE else precision.source
        for plugin in plugins.values() if isinstance(plugins, dict) else [plugins]:
            plugin.set_mixed_precision(precision.value, source)
        partial_state.start_process_group()
        self.__dict__.update(PartialState._shared_state)
        self.distributed_type = DistributedType.DEEPSPEED
        self.deepspeed_plugins = plugins
        first = next(iter(plugins.values())) if isinstance(plugins, dict) else plugins
        first.select(_from_accelerator_state=True)

    def _refuse_change(self, mixed_precision: str | None, cpu: bool) -> None:
        remedy = "restart the process, or pass it to the first `Accelerator(...)`"
        if cpu and self.device.type != "cpu":
            raise ConfigError(f"cpu=True comes too late, the run is on {self.device} already: {remedy}")
        fixed = self.distributed_type != DistributedType.DEEPSPEED
        if fixed and mixed_precision is not None and mixed_precision != self._mixed_precision:
            raise ConfigError(
                f"mixed_precision={mixed_precision!r} comes too late, the run has {self._mixed_precision!r}: {remedy}"
            )

    def __getattr__(self, name: str) -> Any:
        # Methods and properties of PartialState, on the same processes.
        if name.startswith("__") or not self.__dict__:
            return super().__getattr__(name)
        return getattr(PartialState(), name)

    def __repr__(self) -> str:
        shown = f"{PartialState()!r}\nMixed precision type: {self.mixed_precision}\n"
        plugin = self.deepspeed_plugin
        return shown if plugin is None else f"{shown}ds_config: {plugin.deepspeed_config}\n"

    @property
    def mixed_precision(self) -> str:
        """`"no"`, `"fp16"`, `"bf16"` or `"fp8"`, as DeepSpeed runs it."""
        plugin = self.deepspeed_plugin
        if plugin is None or self._mixed_precision == PrecisionType.FP8:
            return self._mixed_precision
        for name in ("fp16", "bf16"):
            if plugin.deepspeed_config.get(name, {}).get("enabled", False) is True:
                return name
        return PrecisionType.NO.value

    @property
    def deepspeed_plugin(self) -> DeepSpeedPlugin | None:
        """The selected plugin; None without DeepSpeed."""
        if self.__dict__.get("distributed_type") != DistributedType.DEEPSPEED:
            return None
        return get_active_deepspeed_plugin(self)

    def get_deepspeed_plugin(self, name: str) -> DeepSpeedPlugin:
        """The plugin of that name, where `Accelerator(deepspeed_plugins={...})` has several."""
        return self._named_plugins(name)[name]

    def select_deepspeed_plugin(self, name: str) -> None:
        """Makes the plugin of that name the one that the next `prepare()` uses."""
        plugins = self._named_plugins(name)
        for other in plugins.values():
            other._unselect()
        plugins[name].select(_from_accelerator_state=True)

    def _named_plugins(self, name: str) -> dict[str, DeepSpeedPlugin]:
        """All plugins, `name` among them."""
        plugins = self.deepspeed_plugins
        if not isinstance(plugins, dict):
            raise ConfigError("the run has no named plugins: pass `Accelerator(deepspeed_plugins={'name': plugin})`")
        if name not in plugins:
            raise ConfigError(f"no DeepSpeed plugin is called {name!r}; there are {sorted(plugins)}")
        return plugins

    @staticmethod
    def _reset_state(reset_partial_state: bool = False) -> None:
        AcceleratorState._shared_state.clear()
        if reset_partial_state:
            PartialState._reset_state()


def get_active_deepspeed_plugin(state: AcceleratorState) -> DeepSpeedPlugin:
    """The selected plugin of `state`.

    Raises:
        ConfigError: the run is not on DeepSpeed.
    """
    plugins = state.__dict__.get("deepspeed_plugins")
    if plugins is None:
        raise ConfigError(
            "there is no DeepSpeed plugin: pass `Accelerator(deepspeed_plugin=DeepSpeedPlugin(...))`"
            " or start with `zeroaccel launch --use_deepspeed`"
        )
    candidates: list[DeepSpeedPlugin] = list(plugins.values()) if isinstance(plugins, dict) else [plugins]
    return next(plugin for plugin in candidates if plugin.selected)


def is_initialized() -> bool:
    """Whether an `Accelerator` was made in this process."""
    return bool(AcceleratorState._shared_state)
