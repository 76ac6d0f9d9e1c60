"""The command line. Nothing heavy is imported before a command runs, so that help and checks answer at once."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 2 something to mend, 75 stopped and resumable, 1 a fault of ours."""
    from gesso.cli.app import app
    from gesso.cli.failure import reporting

    # Their remarks are for programmers; what matters to a run is checked and told by us.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with reporting():
        app(arguments, prog_name="gesso")
