"""Evaluation of checkpoints, behind evaluate.py and eval_compare.py.

    tasks       names of tasks and groups; a `Unit` is a task at a length
    options     the command line, checked
    ruler       RULER's documents, made with the checkpoint's own tokenizer
    planning    which units are asked for, and what they download
    record      results.json of a checkpoint, and what survives a crash beside it
    own_tasks   recall, held-out perplexity and KL, measured by forward passes
    harness     checkpoints and tasks as lm-evaluation-harness expects them
    runner      runs what is missing, in this process or in one per GPU
    tables      Markdown tables and bar charts
    compare     students relative to their teacher
    commands    the two command lines

Each module imports only from those above it.
"""
