"""A `pdsh` whose machines are all this one: each gets the command through a shell, with a login's variables only."""

from __future__ import annotations

import os
import subprocess
import sys


def main(arguments: list[str]) -> int:
    """Runs `-S -f N -w HOST,HOST WORD...`; returns the largest exit status."""
    hosts = arguments[arguments.index("-w") + 1].split(",")
    command = " ".join(arguments[arguments.index("-w") + 2 :])
    login = {name: os.environ[name] for name in ("PATH", "HOME")}
    shells = [
        subprocess.Popen(["sh", "-c", command.replace("%n", str(number))], env=login) for number in range(len(hosts))
    ]
    return max(shell.wait() for shell in shells)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
