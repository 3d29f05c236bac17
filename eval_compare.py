"""Compares students with their teacher: scores, and the share of the teacher's score that each
student keeps.

    python eval_compare.py TEACHER HYBRID ... --tasks local,ruler --data CHUNKS
    python eval_compare.py teacher/results.json hybrid/results.json

Each is a checkpoint, or the results.json of one that evaluate.py wrote. Checkpoints are evaluated
first, with evaluate.py's options, unless their results are there already; of files, the tasks that
all of them hold are compared. Written to --output: compare.md, compare.json, compare.png. The exit
code is 1 if a task failed.

The share is score / teacher's score; of perplexities teacher's / student's, the factor that a
token's probability keeps on average. A KL has none. Its standard error assumes that the two scores
are independent, and is too large where both are of the same documents.
"""

from functools import partial

from runtime.command import run_main

from evaluation.commands import compare_with_teacher

if __name__ == "__main__":
    run_main(partial(compare_with_teacher, description=__doc__))
