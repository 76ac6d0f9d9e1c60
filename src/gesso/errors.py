"""Errors meant for the person at the keyboard: what is wrong, where, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(Exception):
    """Something the user can mend: a wrong key, a missing folder, a broken image.

    `what` is one sentence, `where` a file with its line or key, `fix` the next thing to do.
    The command line prints the three and exits with `exit_code`.
    """

    exit_code = 2

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__("\n".join(self.lines()))

    def lines(self) -> list[str]:
        """The message, one line a part."""
        lines = [f"{self.where}: {self.what}" if self.where else self.what]
        if self.fix:
            lines.append(f"  -> {self.fix}")
        return lines


class Problems(UserError):
    """Several `UserError`s found in one look, reported together."""

    def __init__(self, problems: Sequence[UserError], *, what: str = "") -> None:
        self.problems = tuple(problems)
        plural = "s" if len(self.problems) != 1 else ""
        super().__init__(what or f"{len(self.problems)} problem{plural} found")

    def lines(self) -> list[str]:
        return [self.what + ":", *(line for problem in self.problems for line in problem.lines())]


class ResourceError(UserError):
    """The machine ran out of disk or memory, or a needed device or package is missing."""

    exit_code = 3


class NumericError(UserError):
    """The numbers went wrong: a loss or gradient that is not finite."""

    exit_code = 4


class LockedError(UserError):
    """Another process holds the run folder."""

    exit_code = 5


class Interrupted(UserError):
    """The run was asked to stop (SIGTERM, Ctrl-C); what it had is saved and it can be resumed."""

    exit_code = 75
