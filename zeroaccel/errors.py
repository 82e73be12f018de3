"""Every exception that the library raises on purpose, named after who is at fault."""

from __future__ import annotations

from collections.abc import Sequence


class ZeroAccelError(Exception):
    """Base of all exceptions of this library."""


class ConfigError(ZeroAccelError, ValueError):
    """What the user asked for cannot be: a wrong value, or values that contradict each other.

    Attributes:
        problems: each of them, where there are several.
    """

    problems: Sequence[str] = ()

    @classmethod
    def join(cls, problems: Sequence[str]) -> ConfigError:
        """One error that lists every problem of a configuration."""
        if len(problems) == 1:
            return cls(problems[0])
        lines = "\n".join(f"  {number}. {problem}" for number, problem in enumerate(problems, 1))
        error = cls(f"{len(problems)} problems in the configuration:\n{lines}")
        error.problems = problems
        return error


class ConfigTypeError(ConfigError, TypeError):
    """An argument has a type that cannot work."""


class UsageError(ZeroAccelError, RuntimeError):
    """The training loop calls the library in an order that cannot work."""


class UnsupportedError(ZeroAccelError, NotImplementedError):
    """Something that neither this library nor DeepSpeed can do."""


class EnvironmentProblem(ZeroAccelError, RuntimeError):
    """The machine lacks something: a package, a compiler, a device, a free port."""


class MissingPackage(EnvironmentProblem, ImportError):
    """A package is not installed, or in a version that cannot work."""


class DistributedError(ZeroAccelError, RuntimeError):
    """The ranks disagree, or one of them is gone."""


class CheckpointError(ZeroAccelError, RuntimeError):
    """A checkpoint cannot be written or read."""
