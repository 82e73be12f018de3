"""`zeroaccel config validate`: all problems of DeepSpeed's JSON and of launch configurations, with line and column."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from zeroaccel.commands.arguments import OneLineParser
from zeroaccel.errors import ConfigError

if TYPE_CHECKING:
    from zeroaccel.config.document import HfDeepSpeedConfig, Place, Problem

# Keys that only a launch configuration has; Accelerate writes those as JSON, too.
_OF_A_LAUNCH = ("compute_environment", "distributed_type")


def run(argv: Sequence[str]) -> int:
    """Runs `zeroaccel config validate`.

    Returns:
        0 if there is nothing to mend, 1 if there is, 2 if a file cannot be read.
    """
    parser = OneLineParser(
        prog="zeroaccel config validate",
        usage="zeroaccel config validate FILE...",
        description="List all problems of DeepSpeed configs (JSON) and launch configurations (YAML), one a line:"
        " file:line:column: what is wrong, and what to write.",
        epilog="Exit status: 0 nothing to mend, 1 problems, 2 a file cannot be read.",
    )
    parser.add_argument("files", metavar="FILE", nargs="+", help="a DeepSpeed config or a launch configuration")
    files = list(parser.parse_args(argv).files)
    status = 0
    for path in files:  # grows by the DeepSpeed configs that launch configurations name
        try:
            with open(path, encoding="utf-8") as file:
                text = file.read()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "no text in UTF-8"
            print(f"zeroaccel config validate: error: {path} cannot be read: {reason}", file=sys.stderr)
            status = 2
            continue
        status = max(status, _report(path, text, files))
    return status


def _report(path: str, text: str, files: list[str]) -> int:
    """Prints what there is to say about a file; returns 1 if there is something to mend."""
    launch = _is_launch_configuration(path, text)
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed logs to stdout as soon as it is imported
        problems, notes = _of_launch_configuration(path, files) if launch else _of_deepspeed_config(path)
    kind = "launch configuration" if launch else "DeepSpeed config"
    print(*(problems or [f"{path}: nothing to mend ({kind})", *notes]), sep="\n")
    return 1 if problems else 0


def _is_launch_configuration(path: str, text: str) -> bool:
    if path.endswith((".yaml", ".yml")):
        return True
    try:
        values = json.loads(text)
    except ValueError:
        return not path.endswith(".json") and not text.lstrip().startswith("{")
    return isinstance(values, dict) and any(key in values for key in _OF_A_LAUNCH)


# --- DeepSpeed configs ------------------------------------------------------------------------------------------


Lines = tuple[list[str], list[str]]  # problems and notes


def _of_deepspeed_config(path: str) -> Lines:
    from zeroaccel.config import checks
    from zeroaccel.config.document import HfDeepSpeedConfig

    try:
        document = HfDeepSpeedConfig(path)
    except ConfigError as error:
        return list(error.problems or [str(error)]), []
    problems = sorted((document.place_of(problem.key), problem) for problem in problems_of(document))
    notes = [(document.place_of(note.key), f"note: {note}") for note in checks.depends_on_the_script(document.config)]
    return [_line(path, *problem) for problem in problems], [_line(path, *note) for note in notes]


def problems_of(document: HfDeepSpeedConfig) -> list[Problem]:
    """Everything that cannot be in a DeepSpeed config, whatever the script and the number of ranks."""
    from zeroaccel.config import auto, checks, schema
    from zeroaccel.config.document import leaves
    from zeroaccel.config.facts import Facts

    config = document.config
    problems = [problem for problem in checks.sections(config, "this file") if not problem.key]
    problems += checks.values(document)
    problems += checks.whole_numbers(document, lambda key: "in this file")
    problems += checks.batch_of_no_world(document)
    problems += checks.inert_settings(document)
    told = {problem.key for problem in problems}
    problems += [problem for problem in schema.check(config) if problem.key not in told]
    problems += [
        checks.unserved(key, auto.RULES, Facts(world_size=1))
        for key, value in leaves(config)
        if value == "auto" and not auto.is_served(key)
    ]
    return problems or schema.refusal(config)


# --- launch configurations --------------------------------------------------------------------------------------


def _of_launch_configuration(path: str, files: list[str]) -> Lines:
    from zeroaccel.config import checks, launch_file
    from zeroaccel.config.document import Place
    from zeroaccel.config.precedence import FIELD_KEYS

    try:
        options, places = launch_file.read(path), launch_file.places(path)
    except ConfigError as error:
        return list(error.problems or [str(error)]), []
    named = options.get("deepspeed_config_file")
    if named is not None and os.path.isfile(named) and named not in files:
        files.append(named)
    from zeroaccel.commands.config.asked import asked_of, settings_of

    try:
        plugin = asked_of(settings_of(["--config_file", path])).plugin
    except ConfigError as error:
        place = places.get("deepspeed_config_file", Place(1, 1))
        return [_line(path, place, text) for text in error.problems or [str(error)]], []
    if named is not None:
        return [], []
    option_of = {key: option for option, key in FIELD_KEYS.items()}
    document = plugin.hf_ds_config
    problems = [*checks.values(document), *checks.inert_settings(document)]
    return [_line(path, places.get(option_of.get(each.key, ""), Place(1, 1)), each) for each in problems], []


def _line(path: str, place: Place, text: str) -> str:
    return f"{path}:{place.line}:{place.column}: {text}"
