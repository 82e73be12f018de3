"""What a launch command line and a launch configuration ask of DeepSpeed, as the plugin that every rank would make."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from zeroaccel.commands import launch
from zeroaccel.commands.launch_options import launch_command_parser
from zeroaccel.commands.launch_settings import Settings, settle
from zeroaccel.config import environment
from zeroaccel.config.env_patch import patch_environment
from zeroaccel.config.plugin import DeepSpeedPlugin
from zeroaccel.config.precedence import Level, choose_mixed_precision
from zeroaccel.errors import ConfigError


@dataclass(frozen=True)
class Asked:
    """What is asked for.

    Attributes:
        plugin: of every rank.
        sources: by the variable that tells a rank: the option, or the line of a file.
        warnings: what the plugin warned of.
    """

    plugin: DeepSpeedPlugin
    sources: Mapping[str, str]
    warnings: tuple[str, ...]

    def in_words(self, text: str) -> str:
        """A text that names variables, naming instead what was typed or written."""
        return _in_words(text, self.sources)


def settings_of(argv: Sequence[str], prog: str = "zeroaccel launch", spellings: Sequence[str] = ()) -> Settings:
    """The options of `zeroaccel launch` as they hold; a script may be missing.

    Args:
        argv: what was typed.
        prog: the program that messages name.
        spellings: further options of that program, to be proposed for unknown ones.

    Raises:
        ConfigError: the launch configuration cannot be read.
    """
    parser = launch_command_parser()
    parser.prog = prog
    parser.spellings += spellings
    return settle(parser.parse_args([*argv, sys.executable]))


def asked_of(settings: Settings) -> Asked:
    """What is asked of DeepSpeed if it is launched so.

    Raises:
        ConfigError: values that contradict each other or cannot be, in terms of options and files.
    """
    fields = {name: value for name, value in launch.fields(settings).items() if name != "use_deepspeed"}
    sources = {environment.PREFIX + environment.FIELDS[name]: settings.name(name) for name in fields}
    with patch_environment(**environment.exports(fields)), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            plugin = DeepSpeedPlugin()
            precision = choose_mixed_precision(None)
            plugin.set_mixed_precision(precision.value, None if precision.level is Level.RULE else precision.source)
        except ConfigError as error:
            raise ConfigError(_in_words(str(error), sources)) from None
    return Asked(plugin, sources, tuple(_in_words(str(warning.message), sources) for warning in caught))


def _in_words(text: str, sources: Mapping[str, str]) -> str:
    for variable in sorted(sources, reverse=True):  # of two that begin alike, the longer one first
        text = text.replace(variable, sources[variable])
    return text
