"""Tokenizers, tokenised documents and fixed-length chunks on disk, with metadata that says what made them.

Every data folder holds `train.arrow`, `heldout.arrow` and `metadata.json`; the arrow files are memory-mapped, so
neither writing nor reading needs memory for the corpus. Folders are written under a temporary name and renamed when
complete: one that exists is whole.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from unicodedata import normalize

SPLITS = ("train", "heldout")
METADATA = "metadata.json"
LARGEST = "max_token_id"  # in the metadata of chunks: the largest id that they hold
# The values of options that a folder's metadata does not mention: it was made before they existed.
FORMERLY = {"allow_special_tokens": True, "skip_bad_files": False}


class DataError(ValueError):
    """Data that cannot be used; its message is one line naming file or option, value and cure."""


# ------------------------------------------------------------------------------------------------ tokenizers
TOKENIZER_FILE, TOKENIZER_SETTINGS = "tokenizer.json", "tokenizer_config.json"
# Classes of transformers that take tokenizer.json as it is; the others build a normalizer and a
# pre-tokenizer of their own.
GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")
ACCENTS = "café naïve Zürich Ångström"
# Texts on which tokenizers differ: spaces, digits, code, contractions, accents, compatibility
# forms, scripts, emoji, line ends.
PROBE = (
    "",
    "The quick brown fox jumps over the lazy dog.",
    " one space before",
    "  two before,  two between, two after  ",
    "    ",
    "1 12 123 1234567 3.14 1,000,000 2024-01-31 0x1F",
    "I'm, don't, WE'RE; camelCase snake_case UPPER",
    "def f(x):\n    if x:\n\t\treturn {'a': x[0]}  # comment\n\n\n",
    "!!! ... === >>> ((])) <a href='b'>&amp;</a>",
    normalize("NFC", ACCENTS),
    normalize("NFD", ACCENTS),
    "ﬁ ① ½ ＡＢ ▁ \u00a0 \u200b \u212b \u3000",
    "中文，日本語テキスト 한국어",
    "русский العربية עברית हिन्दी ไทย",
    "😀 👩\u200d👧 🇩🇪",
    "a\nb\r\nc\n\n\nd\te\t\tf\n",
    "<s> </s> <unk> <|endoftext|> [INST]",
)
PROBE_SAMPLE = 2048  # of the vocabulary's entries, and of its added tokens, whose texts are encoded too


def load_tokenizer(name_or_path: str, key: str = "tokenizer"):
    """The tokenizer of a checkpoint or folder, which encodes as its tokenizer.json does, where it
    has one. No code of the checkpoint is run.

    Raises DataError, naming the option `key`, if there is none, it has no EOS token, or its
    vocabulary lacks that.
    """
    try:
        tokenizer, raw = _read_tokenizer(name_or_path)
    except Exception as error:  # the tokenizers library raises Exception itself for a file that it cannot read
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{key}: {name_or_path!r} has no tokenizer that loads ({reason}); name a folder or a hub's model with one"
        ) from None
    if tokenizer.eos_token is None:
        raise DataError(
            f"{key}: {name_or_path!r} has a tokenizer without an EOS token to put between documents; set eos_token"
        )
    if raw is not None and raw.token_to_id(tokenizer.eos_token) is None:
        raise DataError(
            f"{key}: {name_or_path!r} has the EOS token {tokenizer.eos_token!r}, which its {TOKENIZER_FILE} lacks; set eos_token "
            f"in {TOKENIZER_SETTINGS} to one of its tokens"
        )
    return tokenizer


def _read_tokenizer(name_or_path: str):
    """(A tokenizer of transformers, the tokenizers.Tokenizer of its tokenizer.json or None where it
    has no such file).

    transformers may replace what the file says by what the class that is named beside it does. Then
    the generic class reads the file, at first with the properties of added tokens that the settings
    beside it name. Raises ValueError if that differs, too.
    """
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    settings, file = Path(name_or_path) / TOKENIZER_SETTINGS, tokenizer_file(name_or_path)
    # AutoTokenizer trusts config.json's model_type more than the tokenizer itself and would put
    # Qwen2's in place of a home-made one.
    generic = settings.is_file() and json.loads(settings.read_text(encoding="utf-8")).get("tokenizer_class") in GENERIC
    first = PreTrainedTokenizerFast if generic else AutoTokenizer
    if file is None:
        return first.from_pretrained(name_or_path, trust_remote_code=False), None
    raw, reason = Tokenizer.from_file(str(file)), None
    for reader, options in (
        (first, {}),
        (PreTrainedTokenizerFast, {}),
        (PreTrainedTokenizerFast, {"added_tokens_decoder": {}}),
    ):
        try:
            # trust_remote_code unsaid would ask at a terminal, and hang a job.
            tokenizer = reader.from_pretrained(name_or_path, trust_remote_code=False, **options)
        except Exception as error:  # whatever a class makes of a file that is not its own
            reason = error
            continue
        if (text := encoded_otherwise(tokenizer, raw)) is None:
            return tokenizer, raw
        reason = ValueError(f"with the settings beside it, transformers encodes {text!r} otherwise than {file}")
    raise reason


def tokenizer_file(name_or_path: str) -> Path | None:
    """The tokenizer.json of a folder, or among a hub name's cached files; None if there is none."""
    from transformers.utils import cached_file

    if Path(name_or_path).is_dir():
        file = Path(name_or_path) / TOKENIZER_FILE
        return file if file.is_file() else None
    try:
        return Path(cached_file(name_or_path, TOKENIZER_FILE))
    except OSError:
        return None


def encoded_otherwise(tokenizer, raw) -> str | None:
    """A text that `tokenizer`, one of transformers, encodes or decodes otherwise than `raw`, a
    tokenizers.Tokenizer; None if the probe finds none. Leaves `raw` without truncation and padding,
    which are no part of a text's encoding."""
    raw.no_truncation()
    raw.no_padding()
    added = [token.content for token in raw.get_added_tokens_decoder().values()]
    entries = [raw.decode([i], skip_special_tokens=False) for i in _evenly(range(raw.get_vocab_size()))]
    texts = [*PROBE, *(f"a{token}b {token} c" for token in _evenly(added)), *entries]
    for special in (True, False):
        theirs = raw.encode_batch(texts, add_special_tokens=special)
        ours = tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]
        for text, encoding, ids in zip(texts, theirs, ours):
            if encoding.ids != ids or raw.decode(ids) != tokenizer.backend_tokenizer.decode(ids):
                return text
    return None


def _evenly(values):
    """At most PROBE_SAMPLE of the values, evenly spread."""
    return values[:: 1 + len(values) // PROBE_SAMPLE]


def fix_tokenizer_class(folder: Path) -> None:
    """Changes tokenizer_config.json in the exported checkpoint `folder` where AutoTokenizer would
    read the tokenizer otherwise than tokenizer.json says: it then names the generic class.
    References to code of the teacher are removed.

    Raises DataError if AutoTokenizer reads it otherwise all the same.
    """
    from tokenizers import Tokenizer

    file, settings = folder / TOKENIZER_FILE, folder / TOKENIZER_SETTINGS
    values = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    if values.pop("auto_map", None) is not None:
        settings.write_text(json.dumps(values, indent=2))
    if not file.is_file():
        return
    raw = Tokenizer.from_file(str(file))
    for without in ("tokenizer_class", "added_tokens_decoder"):
        if _loads_as(folder, raw):
            return
        values = {name: value for name, value in values.items() if name != without} | {"tokenizer_class": GENERIC[0]}
        settings.write_text(json.dumps(values, indent=2))
    if not _loads_as(folder, raw):
        raise DataError(f"{folder}: transformers does not read the tokenizer as its {TOKENIZER_FILE} says")


def _loads_as(folder: Path, raw) -> bool:
    """Whether a user's AutoTokenizer reads the folder's tokenizer as `raw`, its tokenizer.json,
    says."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception:  # whatever a class makes of a file that is not its own
        return False
    return encoded_otherwise(tokenizer, raw) is None


def beginning(tokenizer) -> list[int]:
    """The BOS with which the tokenizer begins every text, in chat and evaluation too, as Llama 3's
    does; [] for the others."""
    ids = tokenizer("")["input_ids"][:1]
    return ids if ids == [tokenizer.bos_token_id] != [tokenizer.eos_token_id] else []


def end_no_text(tokenizer) -> None:
    """Makes a tokenizer that puts EOS behind every text leave it out, so that what it encodes can
    be gone on with."""
    from tokenizers.processors import TemplateProcessing

    whole, bare = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    if not whole[-1:] == [tokenizer.eos_token_id] != bare[-1:]:
        return
    ids = whole[: len(whole) - len(bare) - 1]
    names = tokenizer.convert_ids_to_tokens(ids)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=[*names, "$A"], pair=[*names, "$A", "$B"], special_tokens=list(zip(names, ids))
    )


def out_of_vocabulary(what: str, token_id: int, vocab_size: int) -> DataError:
    """The error for a token id that a model has no embedding for. what: the option, and where the
    id was found."""
    return DataError(
        f"{what} {token_id}, but the model has a vocabulary of {vocab_size}; take the tokenizer that belongs to the model, or "
        "resize the model's embedding (resize_token_embeddings)"
    )


def check_special_tokens(tokenizer, vocab_size: int, key: str) -> None:
    """Raises DataError, naming the option `key`, if a model of that vocabulary lacks the
    tokenizer's EOS, or the BOS of every text."""
    for name, token_id in (
        ("EOS", tokenizer.eos_token_id),
        *(("BOS", token_id) for token_id in beginning(tokenizer)),
    ):
        if token_id >= vocab_size:
            token = tokenizer.convert_ids_to_tokens(token_id)
            raise out_of_vocabulary(
                f"{key}: {name} of {tokenizer.name_or_path!r}, {token!r}, has the id",
                token_id,
                vocab_size,
            )


def encode_beginnings(tokenizer, texts: list[str]) -> list[list[int]]:
    """The ids of texts that a model goes on with: BOS where the tokenizer begins every text so, as
    training data has it, and no EOS."""
    bos = beginning(tokenizer)
    return [bos + ids for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]


def tokenizer_fingerprint(tokenizer) -> str:
    """A hash of what decides the ids: the vocabulary, merges and normalisation, and EOS; not of
    where it lies."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for volatile in ("padding", "truncation"):
        state.pop(volatile, None)
    text = json.dumps([state, tokenizer.eos_token_id], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------ folders
def data_fingerprint(metadata: dict) -> str:
    """A hash of what decides a data folder's content; not of where its corpus and tokenizer lay, or
    of what follows from it."""
    content = {name: value for name, value in metadata.items() if name not in ("dataset_name", "tokenizer", LARGEST)}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def is_saved_dataset(folder: Path) -> bool:
    """Whether this is a folder of `datasets.save_to_disk`."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def read_metadata(folder: str | Path, key: str | None = None) -> dict:
    """The metadata of a data folder. Raises DataError, naming the option `key`, if the folder is
    missing or not one of ours."""
    folder, option = Path(folder), f"{key}: " if key else ""
    if not folder.is_dir():
        raise DataError(f"{option}{folder}: no such folder; make it with preprocess_chunk.py")
    try:
        return json.loads((folder / METADATA).read_text())
    except (OSError, ValueError):
        cure = "make the folder anew with preprocess_chunk.py"
        if is_saved_dataset(folder):
            cure = (
                f"if it holds chunks: python preprocess_chunk.py --adopt {folder} --tokenizer TEACHER --output_dir DIR"
            )
        raise DataError(f"{option}{folder}: holds no readable {METADATA}; {cure}") from None


def is_done(folder: Path, key: dict) -> bool:
    """Whether `folder` already holds what `key` describes. Raises DataError if it holds something
    else."""
    if not folder.exists() or not any(folder.iterdir()):
        return False
    found = FORMERLY | read_metadata(folder)
    for name, value in key.items():
        if found.get(name) != value:
            raise DataError(
                f"{folder}: was made with {name} {found.get(name)!r}, not {value!r}; choose another --output_dir or remove it"
            )
    return True


# ------------------------------------------------------------------------------------------------ chunks
@dataclass(frozen=True)
class Chunks:
    """Fixed-length token sequences: datasets with a column `input_ids`, and what made them."""

    train: object
    heldout: object | None  # None where nothing was held out
    metadata: dict


def open_chunks(
    cache_dir: str,
    train_seq_len: int | None = None,
    fingerprint: str | None = None,
    key: str = "data.cache_dir",
    vocab_size: int | None = None,
) -> Chunks:
    """The chunks of `cache_dir`, which the option `key` named, memory-mapped.

    train_seq_len: the tokens of a chunk, fingerprint: of the tokenizer, vocab_size: of the model
    that they are for; None: not checked. Raises DataError if they are missing or made for another
    run.
    """
    metadata = read_metadata(cache_dir, key)
    if "context_length" not in metadata:
        raise DataError(
            f"{key}: {cache_dir} holds no chunks; cut its documents with preprocess_chunk.py --tokenized_dataset_path {cache_dir}"
        )
    if train_seq_len not in (None, metadata["context_length"]):
        raise DataError(
            f"{key}: {cache_dir} holds chunks of {metadata['context_length']} tokens, but "
            f"train.train_seq_len is {train_seq_len}; make others with preprocess_chunk.py --context_length {train_seq_len}"
        )
    if fingerprint not in (None, metadata["tokenizer_fingerprint"]):
        raise DataError(
            f"{key}: {cache_dir} was made with the tokenizer {metadata['tokenizer']}, which is not the "
            "teacher's; preprocess again with --tokenizer set to the teacher"
        )
    train = open_split(Path(cache_dir), "train", metadata["num_chunks"])
    heldout = open_split(Path(cache_dir), "heldout", metadata["heldout_chunks"]) if metadata["heldout_chunks"] else None
    if vocab_size is not None:
        # Folders of earlier versions do not say it. They are read for it, quickly if they are in
        # the page cache.
        largest = (
            metadata[LARGEST]
            if LARGEST in metadata
            else max(largest_id(part) for part in (train, heldout) if part is not None)
        )
        if largest >= vocab_size:
            raise out_of_vocabulary(f"{key}: {cache_dir} holds the token id", largest, vocab_size)
    return Chunks(train, heldout, metadata)


def open_chunks_for(
    tokenizer,
    vocab_size: int,
    cache_dir: str,
    train_seq_len: int | None = None,
    key: str = "data.cache_dir",
    model_key: str = "teacher_model.name",
) -> Chunks:
    """The chunks of `cache_dir`, checked against a tokenizer and the vocabulary of the model that
    the option `model_key` names."""
    check_special_tokens(tokenizer, vocab_size, model_key)
    return open_chunks(cache_dir, train_seq_len, tokenizer_fingerprint(tokenizer), key, vocab_size)


def largest_id(dataset) -> int:
    """The largest token id in a split of chunks, whose arrow file is read without being copied."""
    parts = dataset.data.column("input_ids").chunks
    return max(int(part.flatten().to_numpy(zero_copy_only=True).max()) for part in parts if len(part))


def open_split(folder: Path, split: str, rows: int | None = None):
    """The memory-mapped dataset of a data folder's split. Raises DataError if it cannot be read or
    has not so many rows."""
    from datasets import Dataset

    file = folder / f"{split}.arrow"
    try:
        dataset = Dataset.from_file(str(file))
    except (OSError, ValueError):
        raise DataError(f"{file}: missing or damaged; remove {folder} and preprocess again") from None
    if rows not in (None, len(dataset)):
        raise DataError(
            f"{file}: damaged, it has {len(dataset):,} of {rows:,} rows; remove {folder} and preprocess again"
        )
    return dataset


def collate(rows: list[dict]) -> dict:
    """A batch {"input_ids": [B, T] int64}. No attention mask: an all-ones one sends FLA's layers
    down their slow path."""
    import numpy
    import torch

    return {"input_ids": torch.from_numpy(numpy.stack([row["input_ids"] for row in rows]).astype("int64"))}
