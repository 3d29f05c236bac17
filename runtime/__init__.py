"""What the scripts share and no model needs: config, batch plan, data, run folders, checkpoints, process environment.

Scripts import it before other packages (pyproject.toml orders the imports so), so that a wrong Python says what it lacks.
"""

import importlib.util
import sys

_REQUIRED = ("torch", "transformers", "datasets", "fla", "yaml", "tqdm")
_missing = [name for name in _REQUIRED if importlib.util.find_spec(name) is None]
if _missing:
    raise ModuleNotFoundError(
        f"{sys.executable} has no {', '.join(_missing)}; run 'source setup.sh' first, in the project's folder"
    )
