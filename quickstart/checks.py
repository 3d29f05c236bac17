"""What must be seen in the quickstart: each measure with whether it was met."""

from __future__ import annotations

from quickstart.measure import ModelFigures
from reporting.run_record import Curve

TEACHER = "teacher"
UNTRAINED = "all-linear, before stage 1"
ALL_LINEAR = "all-linear, after stage 1"
RESTORED = "hybrid, before stage 2"
HYBRID = "hybrid, after stage 2"
EVEN = "hybrid, evenly spaced layers"
LONG = "hybrid, after stage 3"

TEACHER_RECALL = 0.95  # the least that the teacher must recall
ALL_LINEAR_RECALL = 0.3  # the most that the all-linear student may
HYBRID_RECALL = 0.9  # the least of the hybrid, as a share of the teacher's
EVEN_RECALL = 0.5  # the most of the hybrid with evenly spaced layers, as a share of the hybrid's

Check = tuple[str, bool]  # a statement, and whether it holds


def loss_measures(curves: dict[int, Curve]) -> list[Check]:
    """Every stage lowers its own loss on held-out chunks. curves: of the held-out loss, by stage;
    training logs it before its first step and after its last."""
    checks = []
    for stage, curve in curves.items():
        first = curve[0][1]
        last = curve[-1][1]
        text = f"stage {stage}: its held-out loss falls from {first:.4f} to {last:.4f}"
        checks.append((text, last < first))
    return checks


def heldout_measures(results: dict[str, ModelFigures], entropy: float) -> list[Check]:
    """The teacher predicts, and the students come ever closer to it. entropy: of the tokens'
    frequencies."""
    teacher = results[TEACHER]
    hybrid = results[HYBRID]
    loss = f"held-out loss {teacher.heldout_loss:.3f}"
    checks = [
        (
            f"teacher: {loss} at least 0.5 under the unigram entropy {entropy:.3f}",
            teacher.heldout_loss <= entropy - 0.5,
        )
    ]
    order = [results[name] for name in (UNTRAINED, ALL_LINEAR, RESTORED, HYBRID)]
    for worse, better in zip(order, order[1:]):
        before = f"{worse.name} {worse.heldout_kl:.4f}"
        after = f"{better.name} {better.heldout_kl:.4f}"
        checks.append((f"held-out KL falls: {before} > {after}", better.heldout_kl < worse.heldout_kl))
    stage_1 = results[ALL_LINEAR].heldout_kl
    text = f"held-out KL after stage 2 {hybrid.heldout_kl:.4f} at most half of that after stage 1"
    checks.append((f"{text} {stage_1:.4f}", hybrid.heldout_kl <= stage_1 / 2))
    excess = hybrid.heldout_loss / teacher.heldout_loss - 1
    text = f"held-out loss after stage 2 within 2 % of the teacher's: {excess:+.2%}"
    checks.append((text, excess <= 0.02))
    return checks


def recall_measures(results: dict[str, ModelFigures]) -> list[Check]:
    """Associative recall is there in the teacher, lost without full attention, and back in the
    hybrid, but only with the layers that were selected."""
    recall = {name: figures.associative_recall for name, figures in results.items()}
    teacher = recall[TEACHER]
    linear = recall[ALL_LINEAR]
    checks = [
        (f"teacher recalls: {teacher:.1%}, at least {TEACHER_RECALL:.0%}", teacher >= TEACHER_RECALL),
        (
            f"{ALL_LINEAR}, does not: {linear:.1%}, at most {ALL_LINEAR_RECALL:.0%}",
            linear <= ALL_LINEAR_RECALL,
        ),
    ]
    for name in (HYBRID, LONG):
        bound = f"at least {HYBRID_RECALL:.0%} of the teacher's"
        text = f"{name}, recalls again: {recall[name]:.1%}, {bound}"
        checks.append((text, recall[name] >= HYBRID_RECALL * teacher))
    if EVEN in recall:
        bound = f"at most half of the selected layers' {recall[HYBRID]:.1%}"
        text = f"{EVEN}, does not: {recall[EVEN]:.1%}, {bound}"
        checks.append((text, recall[EVEN] <= EVEN_RECALL * recall[HYBRID]))
    return checks
