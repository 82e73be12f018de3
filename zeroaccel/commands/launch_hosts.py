"""The machines of a hostfile, and the filters that choose some of them, as DeepSpeed writes both."""

from __future__ import annotations

import re

from zeroaccel.errors import ConfigError

Hosts = dict[str, list[int]]


def read_hostfile(path: str) -> Hosts:
    """Machines with their slots.

    Raises:
        ConfigError: it cannot be read, or a line is none of `name slots=N`.
    """
    hosts: Hosts = {}
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ConfigError(f"--deepspeed_hostfile {path} cannot be read: {why}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        found = re.match(r"\s*(\S+)\s+slots=(\d+)", line)
        if found is None:
            raise ConfigError(f"{path}:{number}: {line.strip()!r} is no machine: write `name slots=4`")
        if found[1] in hosts:
            raise ConfigError(f"{path}:{number}: {found[1]} is there twice: write it once, with all its slots")
        hosts[found[1]] = list(range(int(found[2])))
    if not hosts:
        raise ConfigError(f"{path} names no machine: write one a line, `name slots=4`")
    return hosts


def filtered(hosts: Hosts, include: str | None, exclude: str | None) -> Hosts:
    """The slots that a filter leaves, in the hostfile's order.

    Args:
        hosts: what the hostfile says.
        include, exclude: `name@name:0,2`; at most one of them.

    Raises:
        ConfigError: both, or one that names what is not there, or leaves nothing.
    """
    if include and exclude:
        raise ConfigError("--deepspeed_inclusion_filter and --deepspeed_exclusion_filter: pass one of them")
    option = "--deepspeed_inclusion_filter" if include else "--deepspeed_exclusion_filter"
    named = _read_filter(option, include or exclude or "", hosts)
    if include:
        left = {name: named[name] for name in hosts if name in named}
    else:
        left = {name: [slot for slot in slots if slot not in named.get(name, ())] for name, slots in hosts.items()}
    left = {name: slots for name, slots in left.items() if slots}
    if not left:
        raise ConfigError(f"{option} {include or exclude} leaves no machine")
    return left


def _read_filter(option: str, text: str, hosts: Hosts) -> Hosts:
    named: Hosts = {}
    for part in text.split("@") if text else []:
        name, _, slots = part.partition(":")
        if name not in hosts:
            raise ConfigError(f"{option}: {name!r} is not in the hostfile: write some of {', '.join(hosts)}")
        if slots and not re.fullmatch(r"\d+(,\d+)*", slots):
            raise ConfigError(f"{option}: {part!r} cannot be read: write name:0,2")
        wanted = [int(slot) for slot in slots.split(",")] if slots else hosts[name]
        if missing := [slot for slot in wanted if slot not in hosts[name]]:
            raise ConfigError(f"{option}: {name} has no slot {missing[0]}, its slots are 0 to {hosts[name][-1]}")
        named[name] = sorted({*named.get(name, ()), *wanted})
    return named
