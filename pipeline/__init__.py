"""What several scripts share and no model needs: config, batch plan, data, run folder, environment.

The scripts import it before other packages: where those are not installed it ends the process in one line, and it tells FLA,
which reads that when it is imported, where the configurations of its kernels lie."""

import importlib.util
import os
import sys

# What all of them need; whatever else is missing, a module of ours included, is an ImportError as ever.
if missing := [name for name in ("torch", "transformers", "datasets", "fla", "yaml", "tqdm") if importlib.util.find_spec(name) is None]:
    sys.exit(f"{os.path.basename(sys.argv[0])}: error: {sys.executable} has no {', '.join(missing)}; run 'source setup.sh' first, in the project's folder")

from .environment import use_kernel_configs  # noqa: E402

use_kernel_configs()
