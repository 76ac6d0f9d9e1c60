"""The command line. Nothing heavy is imported before a command runs, so that help and checks answer at once."""

from __future__ import annotations

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 2 something to mend, 75 stopped and resumable, 1 a fault of ours."""
    from gesso.cli.app import app
    from gesso.cli.failure import reporting

    with reporting():
        app(arguments, prog_name="gesso")
