"""The questions of the task ablations: prompts whose greedy continuation is scored exactly.

Every prompt shows the format by answered examples, so that base models keep to it. Words are those of recall_tasks.py, which no model
knows. Sources: RULER (arXiv 2404.06654) for retrieval, variable tracking, common and frequent words; multi-query associative
recall (arXiv 2312.04927); the phone book of "Repeat After Me" (arXiv 2402.01032).
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
MOST_NOISE = 1000  # a limit that no useful text reaches, and that infinity does not pass
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
    """answers: what must follow the prompt, in any order where it is several, separated by commas.
    ends: characters of which the first one ends the continuation."""

    prompt: str
    answers: tuple[str, ...]
    ends: str = "\n"

    @property
    def gold(self) -> str:
        """The continuation that scores 1, without what ends it."""
        return " " + ", ".join(self.answers)

    def score(self, continuation: str) -> float:
        """The share of the answers among as many items of the continuation, each compared as a
        whole. What nothing has ended may go on to be something else: its last item does not count.
        """
        stop = min((at for at in map(continuation.find, self.ends) if at >= 0), default=None)
        items = [item.strip() for item in continuation[:stop].split(",")]
        items = items[:-1] if stop is None else items
        return len(set(self.answers) & set(items[: len(self.answers)])) / len(self.answers)


def option(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Options:
    """How hard the tasks are. Raises ValueError for what no text can be made of."""

    num_pairs: int = option(16, "synthetic_retrieval, associative_recall, multi-hop: pairs of key and value")
    num_chains: int = option(4, "variable_tracking: chains of assignments")
    num_hops: int = option(4, "variable_tracking: assignments after a chain's first")
    noise_ratio: float = option(
        1.0, "synthetic_retrieval, variable_tracking: sentences that say nothing, for each other"
    )
    freq_cw: int = option(30, "common_words_extraction: times that a common word comes")
    freq_ucw: int = option(3, "common_words_extraction: times that another word comes")
    num_cw: int = option(10, "common_words_extraction: common words")
    num_ucw: int = option(50, "common_words_extraction: other words")
    zeta_alpha: float = option(2.0, "frequent_words_extraction: the k-th word comes as often as k^-alpha")
    vocab_size: int = option(256, "words to draw from, but for names and for the lists of common words")
    num_words: int = option(500, "frequent_words_extraction: words of the text")
    pb_min_len: int = option(20, "phone_book: fewest entries")
    pb_max_len: int = option(40, "phone_book: most entries")
    ar_max_hops: int = option(2, "multi-hop: the most links from question to answer, from 2")

    def __post_init__(self):
        for spec in fields(self):
            value = getattr(self, spec.name)
            if type(spec.default) is int and value < 1:
                raise ValueError(f"--{spec.name}: {value} must be at least 1")
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


def words_of(options: Options, needed: int, flag: str) -> list[str]:
    """The words to draw from. Raises ValueError, naming `flag`, if they are fewer than are needed."""
    if needed > options.vocab_size:
        raise ValueError(f"--{flag}: needs {needed} different words; set --vocab_size to that, or it lower")
    return WORDS[: options.vocab_size]


def with_noise(rng: random.Random, lines: list[str], ratio: float) -> str:
    """The lines in their order, with `ratio` sentences of noise for each between them."""
    places = [*range(len(lines)), *[-1] * round(len(lines) * ratio)]
    rng.shuffle(places)
    kept = iter(lines)
    return " ".join(rng.choice(FILLER) if place < 0 else next(kept) for place in places)


def answered(head: str, asked: list[tuple[str, str]]) -> Question:
    """`head`, then (question, answer) lines; the last one counts, those before it are examples."""
    shown = "".join(f"{question} {answer}\n" for question, answer in asked[:-1])
    return Question(f"{head}\n{shown}{asked[-1][0]}", (asked[-1][1],))


def synthetic_retrieval(rng: random.Random, options: Options) -> Question:
    """Numbers of several words in a text that else says nothing (RULER's needles with several
    keys)."""
    keys = rng.sample(words_of(options, options.num_pairs, "num_pairs"), options.num_pairs)
    numbers = dict(zip(keys, map(str, rng.sample(range(1_000_000, 10_000_000), len(keys)))))
    text = with_noise(
        rng,
        [f"The number of {key} is {number}." for key, number in numbers.items()],
        options.noise_ratio,
    )
    asked = rng.sample(keys, min(EXAMPLES + 1, len(keys)))
    return answered(text, [(f"What is the number of {key}?", numbers[key]) for key in asked])


def recall(rng: random.Random, options: Options) -> Question:
    """recall_tasks.associative_recall; the questions before the last are the examples."""
    words = words_of(options, options.num_pairs, "num_pairs")
    document = associative_recall(rng, options.num_pairs, min(8, options.num_pairs), len(words))
    return Question(document.prompt, (document.answer,), ends=",\n")


def recall_multihop(rng: random.Random, options: Options) -> Question:
    """recall_tasks.multi_hop_recall over num_pairs pairs, of 2 to ar_max_hops hops."""
    hops = rng.randint(2, options.ar_max_hops)
    chains = max(1, options.num_pairs // hops)
    words = words_of(options, chains * (hops + 1), "num_pairs")
    document = multi_hop_recall(rng, chains, hops, min(8, chains), len(words))
    return Question(document.prompt, (document.answer,), ends=",\n")


def variable_tracking(rng: random.Random, options: Options) -> Question:
    """Chains of assignments, in their order, among others; which variables have a value?"""

    def text(chains: int, ratio: float) -> tuple[str, tuple[str, ...]]:
        names = set()
        while len(names) < chains * (options.num_hops + 1):
            names.add("".join(rng.choices(string.ascii_uppercase, k=5)))
        names, values = (
            rng.sample(sorted(names), len(names)),
            rng.sample(range(10_000, 100_000), chains),
        )
        chained = [names[i::chains] for i in range(chains)]
        pending = [
            [
                f"VAR {chain[0]} = {value}.",
                *(f"VAR {new} = VAR {old}." for old, new in zip(chain, chain[1:])),
            ]
            for chain, value in zip(chained, values)
        ]
        turns = [i for i in range(chains) for _ in pending[i]]
        rng.shuffle(turns)
        lines = [pending[i].pop(0) for i in turns]
        asked = rng.randrange(chains)
        return f"{with_noise(rng, lines, ratio)}\nVariables with the value {values[asked]}:", tuple(chained[asked])

    shown, answers = text(1, 0.0)
    prompt, wanted = text(options.num_chains, options.noise_ratio)
    return Question(f"{shown} {', '.join(answers)}\n{prompt}", wanted)


def common_words_extraction(rng: random.Random, options: Options) -> Question:
    """A numbered list in which num_cw words come freq_cw times, num_ucw freq_ucw times."""
    if (needed := 2 * options.num_cw + options.num_ucw) > len(WORDS) // 2:
        raise ValueError(
            f"--num_ucw: {needed} different words are too many; have at most {len(WORDS) // 2} with twice --num_cw"
        )
    words = rng.sample(WORDS, needed + 5)
    shown, common, others = (
        words[: options.num_cw],
        words[options.num_cw : 2 * options.num_cw],
        words[2 * options.num_cw :],
    )

    def text(often: list[str], frequent: int, seldom: list[str], rare: int) -> str:
        listed = [*often * frequent, *seldom * rare]
        rng.shuffle(listed)
        numbered = " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1))
        return f"{numbered}\nThe {len(often)} words that come most often:"

    example = text(shown, 3, others[-5:], 1)
    return Question(
        f"{example} {', '.join(shown)}\n{text(common, options.freq_cw, others[:-5], options.freq_ucw)}",
        tuple(common),
    )


def frequent_words_extraction(rng: random.Random, options: Options, asked: int = FREQUENT) -> Question:
    """Words as often as a zeta distribution says; which come most often?"""

    def text(words: list[str], length: int, alpha: float) -> str:
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

    shown, words = rng.sample(WORDS, 6), rng.sample(WORDS[: options.vocab_size], options.vocab_size)
    example = f"{text(shown, 40, 2.0)} {', '.join(shown[:asked])}"
    return Question(f"{example}\n{text(words, options.num_words, options.zeta_alpha)}", tuple(words[:asked]))


def phone_book(rng: random.Random, options: Options) -> Question:
    """Names with numbers, one of which is asked for."""
    names = set()
    length = rng.randint(options.pb_min_len, options.pb_max_len)
    while len(names) < length:
        names.add(" ".join(word.capitalize() for word in rng.sample(WORDS, 2)))
    names = rng.sample(sorted(names), length)
    numbers = dict(
        zip(
            names,
            (f"{n // 10_000}-{n % 10_000:04}" for n in rng.sample(range(1_000_000, 10_000_000), length)),
        )
    )
    asked = rng.sample(names, min(EXAMPLES + 1, length))
    book = "\n".join(f"{name}: {number}" for name, number in numbers.items())
    return answered(book, [(f"What is the number of {name}?", numbers[name]) for name in asked])


TASKS: dict[str, Callable[[random.Random, Options], Question]] = {
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
    """A flag for every field of `Options`, and --num_samples."""
    parser.add_argument("--num_samples", type=int, default=100, help="questions of a task (%(default)s)")
    for spec in fields(Options):
        parser.add_argument(
            f"--{spec.name}",
            type=type(spec.default),
            default=spec.default,
            help=f"{spec.metadata['help']} (%(default)s)",
        )


def draw_questions(task: str, args: argparse.Namespace) -> list[Question]:
    """num_samples questions of a task, the same for the same seed and options; more samples begin
    with the fewer."""
    if args.num_samples < 1:
        raise ValueError(f"--num_samples: {args.num_samples} must be at least 1")
    options, rng = (
        Options(**{spec.name: getattr(args, spec.name) for spec in fields(Options)}),
        random.Random(args.seed),
    )
    return [TASKS[SPELLINGS.get(task, task)](rng, options) for _ in range(args.num_samples)]
