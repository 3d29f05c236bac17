"""The questions of the task ablations: prompts whose greedy continuation is scored exactly.

Every prompt shows the format by answered examples, so that base models follow it. Words are those
of recall_tasks.py, which no model has seen. Sources: RULER (arXiv 2404.06654) for retrieval,
variable tracking, common and frequent words; multi-query associative recall (arXiv 2312.04927); the
phone book of "Repeat After Me" (arXiv 2402.01032).
"""

from __future__ import annotations

import argparse
import random
import string
from collections.abc import Callable
from dataclasses import dataclass, field, fields

from recall_tasks import WORDS, associative_recall, multi_hop_recall

FILLER = [
    "The river was calm in the morning.",
    "Somebody had left the gate open again.",
    "Rain was expected later that week.",
    "The shop around the corner sells bread.",
    "A letter lay on the table, unread.",
    "Two birds sat on the old fence.",
]
EXAMPLES = 2  # answered questions before the one that counts
FREQUENT = 3  # words that frequent_words_extraction asks for
MOST_NOISE = 1000  # an upper bound that no useful text reaches, and that excludes infinity
NOISY = ("synthetic_retrieval", "variable_tracking")  # the tasks that take --noise_ratio
FIXED = {  # flag of evaluate_layer_importance.py -> (its only value, why)
    "K": (FREQUENT, "frequent_words_extraction asks for so many words"),
    "pb_few_shots": (
        EXAMPLES + 1,
        "phone_book shows two answered questions before the one that counts",
    ),
}


@dataclass(frozen=True)
class Question:
    """answers: what must follow the prompt; several are separated by commas, in any order. ends:
    characters of which the first one ends the continuation."""

    prompt: str
    answers: tuple[str, ...]
    ends: str = "\n"

    @property
    def gold(self) -> str:
        """The continuation that scores 1, without what ends it."""
        return " " + ", ".join(self.answers)

    def has_ended(self, continuation: str) -> bool:
        return any(end in continuation for end in self.ends)

    def score(self, continuation: str) -> float:
        """The share of the answers among as many items of the continuation, each compared as a
        whole.

        The last item of a continuation that has not ended may still become a longer one: it does
        not count.
        """
        found = [continuation.find(end) for end in self.ends]
        stop = min((at for at in found if at >= 0), default=None)
        items = [item.strip() for item in continuation[:stop].split(",")]
        if stop is None:
            items.pop()
        correct = set(self.answers) & set(items[: len(self.answers)])
        return len(correct) / len(self.answers)


def option(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class QuestionOptions:
    """How many questions, and how hard. Raises ValueError, naming the flag, for what no text can be
    made of."""

    num_samples: int = option(100, "questions of a task")
    num_pairs: int = option(16, "synthetic_retrieval, associative_recall, multi-hop: pairs of key and value")
    num_chains: int = option(4, "variable_tracking: chains of assignments")
    num_hops: int = option(4, "variable_tracking: assignments after a chain's first")
    noise_ratio: float = option(1.0, "synthetic_retrieval, variable_tracking: filler sentences per informative one")
    freq_cw: int = option(30, "common_words_extraction: occurrences of a common word")
    freq_ucw: int = option(3, "common_words_extraction: occurrences of any other word")
    num_cw: int = option(10, "common_words_extraction: common words")
    num_ucw: int = option(50, "common_words_extraction: other words")
    zeta_alpha: float = option(2.0, "frequent_words_extraction: the k-th word's frequency is proportional to k^-alpha")
    vocab_size: int = option(256, "words to draw from, except for names and for the lists of common words")
    num_words: int = option(500, "frequent_words_extraction: words of the text")
    pb_min_len: int = option(20, "phone_book: fewest entries")
    pb_max_len: int = option(40, "phone_book: most entries")
    ar_max_hops: int = option(2, "multi-hop: the most links from question to answer, at least 2")

    def __post_init__(self):
        self._check_counts()
        if not 0 <= self.noise_ratio <= MOST_NOISE:
            raise ValueError(f"--noise_ratio: {self.noise_ratio} must be from 0 to {MOST_NOISE}")
        if self.zeta_alpha <= 0:
            raise ValueError(f"--zeta_alpha: {self.zeta_alpha} must be more than 0")
        if self.freq_cw <= self.freq_ucw:
            raise ValueError(f"--freq_cw: {self.freq_cw} must be more than --freq_ucw, {self.freq_ucw}")
        if self.pb_min_len > self.pb_max_len:
            raise ValueError(f"--pb_min_len: {self.pb_min_len} must be at most --pb_max_len, {self.pb_max_len}")
        if self.ar_max_hops < 2:
            raise ValueError(
                f"--ar_max_hops: {self.ar_max_hops} must be at least 2; associative_recall is the task of one hop"
            )
        if self.vocab_size > len(WORDS):
            raise ValueError(f"--vocab_size: {self.vocab_size} must be at most {len(WORDS)}")

    def _check_counts(self):
        for spec in fields(self):
            value = getattr(self, spec.name)
            if type(spec.default) is int and value < 1:
                raise ValueError(f"--{spec.name}: {value} must be at least 1")


def words_of(options: QuestionOptions, needed: int, flag: str) -> list[str]:
    """The words to draw from. Raises ValueError, naming `flag`, if they are fewer than are
    needed."""
    if needed > options.vocab_size:
        raise ValueError(f"--{flag}: needs {needed} different words; set --vocab_size to that, or it lower")
    return WORDS[: options.vocab_size]


def with_noise(rng: random.Random, lines: list[str], ratio: float) -> str:
    """The lines in their order, with `ratio` filler sentences for each between them."""
    fillers = round(len(lines) * ratio)
    is_filler = [False] * len(lines) + [True] * fillers
    rng.shuffle(is_filler)
    remaining = iter(lines)
    return " ".join(rng.choice(FILLER) if filler else next(remaining) for filler in is_filler)


def with_examples(head: str, asked: list[tuple[str, str]]) -> Question:
    """`head`, then (question, answer) lines; the last one counts, those before it are examples."""
    *examples, (question, answer) = asked
    shown = "".join(f"{example} {its_answer}\n" for example, its_answer in examples)
    return Question(f"{head}\n{shown}{question}", (answer,))


def synthetic_retrieval(rng: random.Random, options: QuestionOptions) -> Question:
    """Numbers of several words among filler sentences (RULER's needles with several keys)."""
    keys = rng.sample(words_of(options, options.num_pairs, "num_pairs"), options.num_pairs)
    drawn = rng.sample(range(1_000_000, 10_000_000), len(keys))
    numbers = {key: str(number) for key, number in zip(keys, drawn)}
    needles = [f"The number of {key} is {number}." for key, number in numbers.items()]
    text = with_noise(rng, needles, options.noise_ratio)
    asked = rng.sample(keys, min(EXAMPLES + 1, len(keys)))
    return with_examples(text, [(f"What is the number of {key}?", numbers[key]) for key in asked])


def recall(rng: random.Random, options: QuestionOptions) -> Question:
    """recall_tasks.associative_recall; the questions before the last are the examples."""
    words = words_of(options, options.num_pairs, "num_pairs")
    document = associative_recall(rng, options.num_pairs, min(8, options.num_pairs), len(words))
    return Question(document.prompt, (document.answer,), ends=",\n")


def recall_multihop(rng: random.Random, options: QuestionOptions) -> Question:
    """recall_tasks.multi_hop_recall over num_pairs pairs, of 2 to ar_max_hops hops."""
    hops = rng.randint(2, options.ar_max_hops)
    chains = max(1, options.num_pairs // hops)
    words = words_of(options, chains * (hops + 1), "num_pairs")
    document = multi_hop_recall(rng, chains, hops, min(8, chains), len(words))
    return Question(document.prompt, (document.answer,), ends=",\n")


def assignments(rng: random.Random, chains: int, hops: int, noise_ratio: float) -> tuple[str, tuple[str, ...]]:
    """Text of interleaved chains of assignments that asks for the variables of one value; and those
    variables."""
    names = set()
    while len(names) < chains * (hops + 1):
        names.add("".join(rng.choices(string.ascii_uppercase, k=5)))
    names = rng.sample(sorted(names), len(names))
    values = rng.sample(range(10_000, 100_000), chains)
    chained = [names[i::chains] for i in range(chains)]
    pending = []
    for chain, value in zip(chained, values):
        copies = [f"VAR {new} = VAR {old}." for old, new in zip(chain, chain[1:])]
        pending.append([f"VAR {chain[0]} = {value}.", *copies])
    turns = [i for i in range(chains) for _ in pending[i]]
    rng.shuffle(turns)
    lines = [pending[i].pop(0) for i in turns]
    asked = rng.randrange(chains)
    text = f"{with_noise(rng, lines, noise_ratio)}\nVariables with the value {values[asked]}:"
    return text, tuple(chained[asked])


def variable_tracking(rng: random.Random, options: QuestionOptions) -> Question:
    """Chains of assignments, interleaved in their order; which variables have a value?"""
    shown, answers = assignments(rng, 1, options.num_hops, 0.0)
    prompt, wanted = assignments(rng, options.num_chains, options.num_hops, options.noise_ratio)
    return Question(f"{shown} {', '.join(answers)}\n{prompt}", wanted)


def numbered_list(rng: random.Random, often: list[str], frequent: int, seldom: list[str], rare: int) -> str:
    """A shuffled list with the words of `often` `frequent` times and those of `seldom` `rare`
    times; asks for `often`."""
    listed = [*often * frequent, *seldom * rare]
    rng.shuffle(listed)
    numbered = " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1))
    return f"{numbered}\nThe {len(often)} words that come most often:"


def common_words_extraction(rng: random.Random, options: QuestionOptions) -> Question:
    """A numbered list in which num_cw words come freq_cw times, num_ucw freq_ucw times."""
    needed = 2 * options.num_cw + options.num_ucw
    if needed > len(WORDS) // 2:
        raise ValueError(
            f"--num_ucw: {needed} different words are too many; have at most {len(WORDS) // 2} with twice --num_cw"
        )
    words = rng.sample(WORDS, needed + 5)
    shown = words[: options.num_cw]
    common = words[options.num_cw : 2 * options.num_cw]
    others = words[2 * options.num_cw :]
    example = numbered_list(rng, shown, 3, others[-5:], 1)
    asked = numbered_list(rng, common, options.freq_cw, others[:-5], options.freq_ucw)
    return Question(f"{example} {', '.join(shown)}\n{asked}", tuple(common))


def zeta_text(rng: random.Random, words: list[str], length: int, alpha: float, asked: int) -> str:
    """About `length` words, the k-th in proportion to k^-alpha; asks for the `asked` most frequent.
    Raises ValueError if those do not stand out."""
    weights = [k**-alpha for k in range(1, len(words) + 1)]
    counts = [round(length * weight / sum(weights)) for weight in weights]
    if len(counts) <= asked or counts[asked - 1] == counts[asked]:
        raise ValueError(
            f"--num_words: {length} words, the most frequent coming {counts[: asked + 1]} times, do not tell "
            f"{asked} from the next; raise it, --zeta_alpha or --vocab_size"
        )
    listed = [word for word, count in zip(words, counts) for _ in range(count)]
    rng.shuffle(listed)
    return f"{' '.join(listed)}\nThe {asked} words that come most often:"


def frequent_words_extraction(rng: random.Random, options: QuestionOptions, asked: int = FREQUENT) -> Question:
    """Words with the frequencies of a zeta distribution; which come most often?"""
    shown = rng.sample(WORDS, 6)
    words = rng.sample(WORDS[: options.vocab_size], options.vocab_size)
    example = zeta_text(rng, shown, 40, 2.0, asked)
    text = zeta_text(rng, words, options.num_words, options.zeta_alpha, asked)
    return Question(f"{example} {', '.join(shown[:asked])}\n{text}", tuple(words[:asked]))


def phone_book(rng: random.Random, options: QuestionOptions) -> Question:
    """Names with numbers, one of which is asked for."""
    names = set()
    length = rng.randint(options.pb_min_len, options.pb_max_len)
    while len(names) < length:
        names.add(" ".join(word.capitalize() for word in rng.sample(WORDS, 2)))
    names = rng.sample(sorted(names), length)
    drawn = rng.sample(range(1_000_000, 10_000_000), length)
    numbers = {name: f"{number // 10_000}-{number % 10_000:04}" for name, number in zip(names, drawn)}
    asked = rng.sample(names, min(EXAMPLES + 1, length))
    book = "\n".join(f"{name}: {number}" for name, number in numbers.items())
    return with_examples(book, [(f"What is the number of {name}?", numbers[name]) for name in asked])


TASKS: dict[str, Callable[[random.Random, QuestionOptions], Question]] = {
    "synthetic_retrieval": synthetic_retrieval,
    "associative_recall": recall,
    "associative_recall_multihop": recall_multihop,
    "variable_tracking": variable_tracking,
    "common_words_extraction": common_words_extraction,
    "frequent_words_extraction": frequent_words_extraction,
    "phone_book": phone_book,
}
SPELLINGS = {"associative_recall_mutihop": "associative_recall_multihop"}  # an old one that scripts use


def add_options(parser: argparse.ArgumentParser) -> None:
    """A flag for every field of `QuestionOptions`."""
    for spec in fields(QuestionOptions):
        parser.add_argument(
            f"--{spec.name}",
            type=type(spec.default),
            default=spec.default,
            help=f"{spec.metadata['help']} (%(default)s)",
        )


def question_options(args: argparse.Namespace) -> QuestionOptions:
    """What the flags of `add_options` were set to."""
    return QuestionOptions(**{spec.name: getattr(args, spec.name) for spec in fields(QuestionOptions)})


def draw_questions(task: str, options: QuestionOptions, seed: int) -> list[Question]:
    """num_samples questions of a task, the same for the same seed and options; a larger sample
    begins with the smaller one."""
    rng = random.Random(seed)
    make = TASKS[SPELLINGS.get(task, task)]
    return [make(rng, options) for _ in range(options.num_samples)]
