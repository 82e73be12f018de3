"""`zeroaccel config explain`: every value that DeepSpeed would be handed, where it comes from, and why."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from zeroaccel.commands.arguments import OneLineParser, add_option, count, number

if TYPE_CHECKING:
    from zeroaccel.commands.config.asked import Asked
    from zeroaccel.commands.launch_settings import Settings
    from zeroaccel.config.facts import Facts, ModelFact, ResolvedConfig

# Stands for a model of unknown size: no bucket is bounded by it.
_LARGE = 10**15


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog="zeroaccel config explain",
        usage="zeroaccel config explain [facts] [options of zeroaccel launch]",
        description="Print every value that DeepSpeed would be handed, where it comes from, and why. Takes all options"
        "\nof `zeroaccel launch`, too: --config_file and --deepspeed_config_file among them, and --num_processes.",
        epilog="What only the script can tell, and nobody told here, stays `auto`.",
    )
    group = parser.add_argument_group("facts, which prepare() will know")

    def add(*names: str, **kwargs: object) -> None:
        add_option(parser, group, *names, **kwargs)

    add("--model", metavar="MODEL", help="folder with a Hugging Face config.json, or a model of the hub")
    add("--hidden_size", type=number(int, 1), metavar="H", help="in place of MODEL: width of a transformer")
    add("--num_parameters", type=count, metavar="N", help="in place of MODEL: 350M, 7B, 7e9")
    add("--batch_size", type=number(int, 1), metavar="B", help="of the DataLoader")
    add("--json", action="store_true", help="for programs")
    return parser


def run(argv: Sequence[str]) -> int:
    """Runs `zeroaccel config explain`."""
    parser = _parser()
    given, rest = parser.parse_known_args(argv)
    if given.model and (given.hidden_size or given.num_parameters):
        parser.error("--model tells --hidden_size and --num_parameters: leave one side away")
    from zeroaccel.commands.config.asked import asked_of, settings_of

    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed logs to stdout as soon as it is imported
        settings = settings_of(rest, parser.prog, parser.spellings)
        asked = asked_of(settings)
        resolved = _resolved(asked, _facts(given, settings, asked))
    print(_as_json(resolved) if given.json else resolved.table())
    for warning in resolved.warnings:
        print(f"{parser.prog}: {warning}", file=sys.stderr)
    return 0


def _facts(given: argparse.Namespace, settings: Settings, asked: Asked) -> Facts:
    from zeroaccel.config.facts import Facts, LoaderFact, OptimizerFact

    return Facts(
        world_size=_ranks(settings),
        loaders=(LoaderFact(given.batch_size, training=True),) if given.batch_size else (),
        model=_model(given),
        optimizer=OptimizerFact("optimizer" in asked.plugin.deepspeed_config, "the script's optimizer", {}),
    )


def _ranks(settings: Settings) -> int:
    options = settings.options
    if options.num_processes:
        return int(options.num_processes)
    from zeroaccel.commands import launch_elastic

    return max(1, 0 if options.cpu else launch_elastic.device_count()) * (options.num_machines or 1)


def _model(given: argparse.Namespace) -> ModelFact | None:
    from zeroaccel.config.facts import ModelFact

    if given.model:
        from zeroaccel.engine.facts import model_fact
        from zeroaccel.engine.pretrained import empty_model

        return model_fact(empty_model(given.model))
    if given.hidden_size is None and given.num_parameters is None:
        return None
    return ModelFact(given.num_parameters or _LARGE, 0, given.hidden_size, "--hidden_size")


def _resolved(asked: Asked, facts: Facts) -> ResolvedConfig:
    """What `prepare()` would resolve, with sources as the user knows them.

    Raises:
        ConfigError: all that cannot be.
    """
    from zeroaccel.config import auto, schema
    from zeroaccel.config.facts import Entry, ResolvedConfig
    from zeroaccel.errors import ConfigError

    try:
        resolved = auto.foresee(asked.plugin, facts)
    except ConfigError as error:
        raise ConfigError(asked.in_words(str(error))) from None
    if problems := schema.check(resolved.config):
        raise ConfigError.join(problems)
    entries = (Entry(each.key, each.value, asked.in_words(each.source), each.reason) for each in resolved.entries)
    told = (*asked.warnings, *map(asked.in_words, resolved.warnings))
    return ResolvedConfig(resolved.config, tuple(entries), told)


def _as_json(resolved: ResolvedConfig) -> str:
    text = json.dumps(
        {
            "config": resolved.config,
            "entries": [asdict(entry) for entry in resolved.entries],
            "warnings": resolved.warnings,
        },
        indent=2,
    )
    return text.replace(": Infinity", ": 1e999")  # infinity as JSON has it: beyond the largest number
