"""Runs FLA's Triton kernels, forward and backward, on CPU tensors in Triton's interpreter
(NumPy): slow, but exact.

`interpret()` must be called before FLA is imported, in a process of its own: it cannot be undone.
The interpreter does not cover the autotuner's choices (it takes the first), TF32, and bf16, whose
dot products it computes wrongly.
"""

import builtins
import os


class _Int(int):
    def to(self, *_, **__):
        return self


def _range(*bounds):
    return [_Int(i) for i in builtins.range(*map(int, bounds))]


def interpret() -> None:
    os.environ |= {"TRITON_INTERPRET": "1", "FLA_CACHE_RESULTS": "0"}
    import triton.language
    from triton.backends.nvidia.compiler import min_dot_size
    from triton.runtime import interpreter
    from triton.runtime.autotuner import Autotuner

    def run_first_config(self, *args, **kwargs):  # benchmarks need a GPU
        configs = self.configs
        if self.early_config_prune is not None:
            self.nargs = dict(zip(self.arg_names, args))
            configs = self.early_config_prune(configs, self.nargs, **kwargs) or configs
        self.best_config = configs[0]
        return self.fn.run(*args, **kwargs | self.best_config.all_kwargs())

    def with_range(self, fn, **kwargs):  # FLA's kernels call .to() on what tensors, not Python, count by
        fn.__globals__.setdefault("range", _range)
        interpreted_init(self, fn, **kwargs)

    interpreted_init = interpreter.InterpretedFunction.__init__
    interpreter.InterpretedFunction.__init__ = with_range
    Autotuner.run = run_first_config
    precisions = (
        *interpreter.InterpreterOptions.allowed_dot_input_precisions,
        "bf16x3",
    )  # FLA asks for it on Hopper
    builder = interpreter.interpreter_builder
    builder.options = interpreter.InterpreterOptions(allowed_dot_input_precisions=precisions)
    builder.codegen_fns["min_dot_size"] = min_dot_size(None)  # as strict as a GPU with small blocks
    del (
        triton.language.gather
    )  # FLA keeps the compiled one, which the interpreter cannot run; without it, it does without
