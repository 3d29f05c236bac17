"""How every script runs its `main`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from .autotuning import use_kernel_configs
from .checkpoints import CheckpointError
from .files import one_line


def run_main(main: Callable[[], int | None]) -> None:
    """Runs a script's `main` and exits with what it returns. Errors that the user can correct end
    in one line and exit code 1."""
    use_kernel_configs()
    try:
        sys.exit(main())
    except (ValueError, OSError, CheckpointError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {one_line(error)}")
