"""The configurations of Triton kernels: read from `kernel_configs/` instead of being measured, and
written there.

The vLLM plug-in installs a copy of this folder: it imports nothing else of the project."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
from functools import cache, wraps
from pathlib import Path

KERNEL_CONFIGS = Path(__file__).with_name("kernel_configs")
STATES = ("h0", "ht", "initial_state")  # arguments of FLA's kernels: states before and after a call


def use_kernel_configs() -> None:
    """Makes FLA's autotuner read the configurations of its kernels from `kernel_configs/` instead
    of measuring them for a minute or two, also for chunks read document by document and texts that
    are continued.

    Uses the user's FLA_CACHE_MODE and FLA_CONFIG_DIR if they are set. Otherwise the folder must
    have configurations for the compute capability of this machine's GPUs, all of the same.
    benchmarks/train_throughput.py --save_kernel_configs writes the files.
    """
    if not shutil.which("nvidia-smi"):
        return
    _cache_every_kernel_of_fla()
    if {"FLA_CACHE_MODE", "FLA_CONFIG_DIR"} & set(os.environ):
        return
    try:
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except subprocess.SubprocessError:  # no driver, or a GPU that hangs
        return
    capabilities = {line.strip().replace(".", "") for line in done.stdout.splitlines()}
    if len(capabilities) != 1:
        return
    folder = KERNEL_CONFIGS / f"sm_{capabilities.pop()}"
    if not folder.is_dir():
        return
    # fuzzy: a configuration measured at one number of heads is used for others; dtypes and flags
    # must match.
    os.environ["FLA_CACHE_MODE"] = "fuzzy"
    os.environ["FLA_CONFIG_DIR"] = str(folder)
    fla_cache = sys.modules.get("fla.ops.utils.cache")
    if fla_cache is not None:  # FLA reads the mode at import, the folder at each lookup
        fla_cache.FLA_CACHE_MODE = fla_cache.FlaCacheMode.FUZZY


def _cache_every_kernel_of_fla() -> None:
    """FLA looks up the configurations of only those kernels that it decorates with its own
    autotuner. Gives the same lookup to the others, when they first run, and to all of them that of
    `_autotuner_for_documents`.

    The file of the others is named after their module too, because several of them share a name.
    """
    from triton.runtime.autotuner import Autotuner

    run = Autotuner.run
    if hasattr(run, "__wrapped__"):
        return

    @wraps(run)
    def run_with_config(self, *args, **kwargs):
        if self.base_fn.__module__.startswith("fla.") and type(self) is not _autotuner_for_documents():
            self.kernel_name = kernel_name(self)
            self.__class__ = _autotuner_for_documents()
            return self.run(*args, **kwargs)
        return run(self, *args, **kwargs)

    Autotuner.run = run_with_config


@cache
def _autotuner_for_documents() -> type:
    """A subclass of FLA's autotuner: a kernel that has no configuration for a call with documents
    or states takes that of the same call without them, whose best is nearly as fast.

    FLA's key has the dtype of every tensor, also of states, the bounds of documents and the list of
    their chunks (int32, int64), and for some kernels the flag IS_VARLEN, which a fuzzy lookup compares.
    The length of the chunks listed must not be part of a configuration; no file of a kernel that
    takes such a list has it.
    """
    import torch
    from fla.ops.utils import cache as fla_cache

    class AutotunerForDocuments(fla_cache.CachedAutotuner):
        def maybe_load_cached_config(self, key, nargs, runtime_kwargs):
            super().maybe_load_cached_config(key, nargs, runtime_kwargs)
            is_found = key.autotune_key in self.cache
            if is_found or fla_cache.FLA_CACHE_MODE is not fla_cache.FlaCacheMode.FUZZY:
                return
            arguments = {
                name: False if name == "IS_VARLEN" else value
                for name, value in {**nargs, **runtime_kwargs}.items()
                if name not in STATES and getattr(value, "dtype", None) not in (torch.int32, torch.int64)
            }
            whole = fla_cache.AutotuneKey.build(self.arg_names, self.keys, (), arguments)
            if whole == key:
                return
            super().maybe_load_cached_config(whole, nargs, runtime_kwargs)
            if whole.autotune_key in self.cache:
                self.cache[key.autotune_key] = self.cache[whole.autotune_key]

    return AutotunerForDocuments


def kernel_name(tuner) -> str:
    """The name of the file that holds the configurations of an autotuned kernel."""
    return getattr(tuner, "kernel_name", None) or f"{tuner.base_fn.__module__}.{tuner.base_fn.__name__}"


def save_kernel_configs(folder: Path) -> None:
    """Adds the configurations that this process's autotuned kernels of FLA run with to the files
    that `use_kernel_configs` makes FLA read."""
    import triton
    from fla.ops.utils.cache import AutotuneKey
    from triton.runtime.autotuner import Autotuner

    folder.mkdir(parents=True, exist_ok=True)
    # By type(): isinstance raises for a weak reference whose object is gone.
    tuners = [x for x in gc.get_objects() if issubclass(type(x), Autotuner) and x.cache]
    for tuner in tuners:
        if not tuner.base_fn.__module__.startswith("fla."):
            continue
        file = folder / f"{kernel_name(tuner)}.json"
        entries = json.loads(file.read_text())["autotune_entries"] if file.is_file() else {}
        for key, config in tuner.cache.items():
            names = ("kwargs", "num_warps", "num_stages", "num_ctas", "maxnreg")
            entry = {
                "autotune_key": AutotuneKey.normalize_autotune_key(key),
                "config": {name: getattr(config, name) for name in names},
            }
            entries.setdefault(AutotuneKey.key_hash(key), entry)
        content = {
            "kernel_name": tuner.base_fn.__name__,
            "triton_version": triton.__version__,
            "autotune_entries": entries,
        }
        file.write_text(json.dumps(content, indent=1) + "\n")
