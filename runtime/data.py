"""Tokenizers, tokenised documents and fixed-length chunks on disk, with metadata that records how
they were made.

Every data folder holds `train.arrow`, `heldout.arrow` and `metadata.json`; the arrow files are
memory-mapped, so neither writing nor reading needs memory for the corpus. Folders are written
atomically: one that exists is complete.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from unicodedata import normalize

SPLITS = ("train", "heldout")
METADATA = "metadata.json"
# Columns: token ids; where only part of the text is learned, whether each token is; and of chunks the
# tokens of each document in the chunk, in order: what is left of the chunk is padding.
INPUT_IDS = "input_ids"
LOSS_MASK = "loss_mask"
DOCUMENT_LENGTHS = "document_lengths"
DOCUMENT_IDS = "document_ids"  # in a batch: which document each token is of, see `collate`
PADDING = -1
# Of a teacher's stored outputs, and their dtypes in a batch.
TEACHER_COLUMNS = {"teacher_values": "float16", "teacher_ids": "int32", "teacher_log_rest": "float16"}
LARGEST = "max_token_id"  # in the metadata of chunks: their largest token id
# The values of options that the metadata of an older folder lacks: it was made before they existed.
FORMERLY = {"allow_special_tokens": True, "skip_bad_files": False, "packing": "cut"}
# In the metadata of data with conversations only.
OF_CONVERSATIONS = ("loss_on", "chat_template")


class DataError(ValueError):
    """Data that cannot be used; its message is one line naming file or option, value and cure."""


# --------------------------------------------------------------------------------------- tokenizers
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_SETTINGS = "tokenizer_config.json"
# Classes of transformers that use tokenizer.json unchanged; the others build their own normalizer
# and pre-tokenizer.
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
PROBE_SAMPLE = 2048  # vocabulary entries, and added tokens, whose texts are encoded too


def load_tokenizer(name_or_path: str, key: str = "tokenizer"):
    """The tokenizer of a model or folder, which encodes as its tokenizer.json says, if it has one.
    Code in the folder is not run.

    Raises DataError, naming the option `key`, if there is no tokenizer, it has no EOS token, or its
    vocabulary lacks that token.
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
            f"{key}: {name_or_path!r} has the EOS token {tokenizer.eos_token!r}, which its {TOKENIZER_FILE} lacks; "
            f"set eos_token in {TOKENIZER_SETTINGS} to one of its tokens"
        )
    return tokenizer


def _read_tokenizer(name_or_path: str):
    """(A tokenizer of transformers, the tokenizers.Tokenizer of its tokenizer.json or None if it
    has no such file).

    The class named in tokenizer_config.json may encode differently from tokenizer.json says. Then the
    generic class reads the file, first with the properties of added tokens from
    tokenizer_config.json, then without. Raises ValueError if all of them differ.
    """
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    settings = Path(name_or_path) / TOKENIZER_SETTINGS
    file = tokenizer_file(name_or_path)
    first = AutoTokenizer
    # AutoTokenizer prefers config.json's model_type to the tokenizer's own class, and would replace
    # a custom tokenizer by Qwen2's.
    if settings.is_file():
        values = json.loads(settings.read_text(encoding="utf-8"))
        if values.get("tokenizer_class") in GENERIC:
            first = PreTrainedTokenizerFast
    if file is None:
        return first.from_pretrained(name_or_path, trust_remote_code=False), None
    raw = Tokenizer.from_file(str(file))
    reason = None
    for reader, options in (
        (first, {}),
        (PreTrainedTokenizerFast, {}),
        (PreTrainedTokenizerFast, {"added_tokens_decoder": {}}),
    ):
        try:
            # Without trust_remote_code, transformers would ask at a terminal, and a job would hang.
            tokenizer = reader.from_pretrained(name_or_path, trust_remote_code=False, **options)
        except Exception as error:  # classes raise anything for a file that is not theirs
            reason = error
            continue
        if (text := encoded_otherwise(tokenizer, raw)) is None:
            return tokenizer, raw
        reason = ValueError(f"with the settings beside it, transformers encodes {text!r} differently from {file}")
    raise reason


def tokenizer_file(name_or_path: str) -> Path | None:
    """The tokenizer.json of a folder or hub model; None if there is none."""
    from transformers.utils import cached_file

    if Path(name_or_path).is_dir():
        file = Path(name_or_path) / TOKENIZER_FILE
        return file if file.is_file() else None
    try:
        return Path(cached_file(name_or_path, TOKENIZER_FILE))
    except OSError:
        return None


def encoded_otherwise(tokenizer, raw) -> str | None:
    """A text that `tokenizer`, one of transformers, encodes or decodes differently from `raw`, a
    tokenizers.Tokenizer; None if none of the probe texts differs. Removes truncation and padding
    from `raw`."""
    raw.no_truncation()
    raw.no_padding()
    added = [token.content for token in raw.get_added_tokens_decoder().values()]
    entries = [raw.decode([i], skip_special_tokens=False) for i in _evenly(range(raw.get_vocab_size()))]
    with_added = [f"a{token}b {token} c" for token in _evenly(added)]
    texts = [*PROBE, *with_added, *entries]
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
    """Makes AutoTokenizer load the exported model `folder`'s tokenizer as tokenizer.json says:
    where it would not, tokenizer_config.json is changed to name the generic class. References to
    code of the teacher are removed.

    Raises DataError if AutoTokenizer still loads another tokenizer.
    """
    from tokenizers import Tokenizer

    file = folder / TOKENIZER_FILE
    settings = folder / TOKENIZER_SETTINGS
    values = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    if values.pop("auto_map", None) is not None:
        settings.write_text(json.dumps(values, indent=2))
    if not file.is_file():
        return
    raw = Tokenizer.from_file(str(file))
    for without in ("tokenizer_class", "added_tokens_decoder"):
        if _loads_as(folder, raw):
            return
        values.pop(without, None)
        values["tokenizer_class"] = GENERIC[0]
        settings.write_text(json.dumps(values, indent=2))
    if not _loads_as(folder, raw):
        raise DataError(f"{folder}: transformers does not read the tokenizer as its {TOKENIZER_FILE} says")


def _loads_as(folder: Path, raw) -> bool:
    """Whether AutoTokenizer loads the folder's tokenizer as `raw`, its tokenizer.json, says."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception:  # classes raise anything for a file that is not theirs
        return False
    return encoded_otherwise(tokenizer, raw) is None


def beginning(tokenizer) -> list[int]:
    """[BOS] if the tokenizer puts it before every text, as Llama 3's does; else []."""
    ids = tokenizer("")["input_ids"][:1]
    return ids if ids == [tokenizer.bos_token_id] != [tokenizer.eos_token_id] else []


def end_no_text(tokenizer) -> None:
    """Makes a tokenizer that appends EOS to every text stop doing so, so that a model can continue
    the text."""
    from tokenizers.processors import TemplateProcessing

    whole = tokenizer("a", add_special_tokens=True)["input_ids"]
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    if not whole[-1:] == [tokenizer.eos_token_id] != bare[-1:]:
        return
    ids = whole[: len(whole) - len(bare) - 1]
    names = tokenizer.convert_ids_to_tokens(ids)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=[*names, "$A"],
        pair=[*names, "$A", "$B"],
        special_tokens=list(zip(names, ids)),
    )


def out_of_vocabulary(what: str, token_id: int, vocab_size: int) -> DataError:
    """The error for a token id that a model has no embedding for. what: the option, and where the
    id was found."""
    return DataError(
        f"{what} {token_id}, but the model has a vocabulary of {vocab_size}; "
        "take the tokenizer that belongs to the "
        "model, or resize the model's embedding (resize_token_embeddings)"
    )


def check_special_tokens(tokenizer, vocab_size: int, key: str) -> None:
    """Raises DataError, naming the option `key`, if the tokenizer's EOS, or the BOS that it puts
    before every text, is outside a model's vocabulary."""
    special = [("EOS", tokenizer.eos_token_id)]
    special += [("BOS", token_id) for token_id in beginning(tokenizer)]
    for name, token_id in special:
        if token_id >= vocab_size:
            token = tokenizer.convert_ids_to_tokens(token_id)
            what = f"{key}: {name} of {tokenizer.name_or_path!r}, {token!r}, has the id"
            raise out_of_vocabulary(what, token_id, vocab_size)


def encode_beginnings(tokenizer, texts: list[str]) -> list[list[int]]:
    """The ids of texts for a model to continue: with BOS if the tokenizer puts it before every
    text, as in the training data, and without EOS."""
    bos = beginning(tokenizer)
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return [bos + ids for ids in encoded]


def tokenizer_fingerprint(tokenizer) -> str:
    """A hash of what decides the ids: vocabulary, merges, normalisation and EOS; not of its path."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for volatile in ("padding", "truncation"):
        state.pop(volatile, None)
    text = json.dumps([state, tokenizer.eos_token_id], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------ folders
def data_fingerprint(metadata: dict) -> str:
    """A hash of the metadata that decides a data folder's content: without the paths of corpus and
    tokenizer, and without what follows from the rest."""
    ignored = ("dataset_name", "mixture", "tokenizer", LARGEST)
    content = {name: value for name, value in metadata.items() if name not in ignored}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def is_saved_dataset(folder: Path) -> bool:
    """Whether this is a folder of `datasets.save_to_disk`."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def read_metadata(folder: str | Path, key: str | None = None) -> dict:
    """The metadata of a data folder. Raises DataError, naming the option `key`, if the folder is
    missing or has no metadata."""
    folder = Path(folder)
    option = f"{key}: " if key else ""
    if not folder.is_dir():
        raise DataError(f"{option}{folder}: no such folder; make it with preprocess_chunk.py")
    try:
        return json.loads((folder / METADATA).read_text())
    except (OSError, ValueError):
        cure = "make the folder again with preprocess_chunk.py"
        if is_saved_dataset(folder):
            command = f"python preprocess_chunk.py --adopt {folder} --tokenizer TEACHER --output_dir DIR"
            cure = f"if it holds chunks: {command}"
        raise DataError(f"{option}{folder}: holds no readable {METADATA}; {cure}") from None


def is_done(folder: Path, key: dict) -> bool:
    """Whether `folder` already holds what `key` describes. Raises DataError if it holds something
    else."""
    if not folder.exists() or not any(folder.iterdir()):
        return False
    found = FORMERLY | read_metadata(folder)
    for name in dict.fromkeys((*key, *OF_CONVERSATIONS)):
        value = key.get(name)
        if found.get(name) != value:
            raise DataError(
                f"{folder}: was made with {name} {found.get(name)!r}, not {value!r}; "
                "choose another --output_dir or remove it"
            )
    return True


# ------------------------------------------------------------------------------------------- chunks
@dataclass(frozen=True)
class Chunks:
    """Fixed-length token sequences: datasets with a column `input_ids`, perhaps `loss_mask`, and
    `document_lengths` where the documents of a chunk are read one by one; and their metadata."""

    train: object
    heldout: object | None  # None if nothing was held out
    metadata: dict

    @property
    def has_documents(self) -> bool:
        """Whether the documents of a chunk are read one by one."""
        return DOCUMENT_LENGTHS in self.train.column_names


def open_chunks(
    cache_dir: str,
    train_seq_len: int | None = None,
    fingerprint: str | None = None,
    key: str = "data.cache_dir",
    vocab_size: int | None = None,
    document_mask: bool | str = False,
) -> Chunks:
    """The memory-mapped chunks in `cache_dir`, the value of the option `key`.

    train_seq_len (tokens per chunk), fingerprint (of the tokenizer) and vocab_size (of the model)
    are what the chunks must fit; None: not checked. document_mask: whether the documents of a chunk
    are read one by one; auto: where the chunks record them. Raises DataError if they are missing or
    do not fit.
    """
    metadata = read_metadata(cache_dir, key)
    if "context_length" not in metadata:
        raise DataError(
            f"{key}: {cache_dir} holds no chunks; "
            f"cut its documents with preprocess_chunk.py --tokenized_dataset_path {cache_dir}"
        )
    if train_seq_len not in (None, metadata["context_length"]):
        raise DataError(
            f"{key}: {cache_dir} holds chunks of {metadata['context_length']} tokens, "
            f"but train.train_seq_len is {train_seq_len}; "
            f"make others with preprocess_chunk.py --context_length {train_seq_len}"
        )
    if fingerprint not in (None, metadata["tokenizer_fingerprint"]):
        raise DataError(
            f"{key}: {cache_dir} was made with the tokenizer {metadata['tokenizer']}, which is not the "
            "teacher's; preprocess again with --tokenizer set to the teacher"
        )
    train = open_split(Path(cache_dir), "train", metadata["num_chunks"])
    heldout = None
    if metadata["heldout_chunks"]:
        heldout = open_split(Path(cache_dir), "heldout", metadata["heldout_chunks"])
    if vocab_size is not None:
        largest = metadata.get(LARGEST)
        if largest is None:  # a folder of an earlier version: all of its chunks are read
            largest = max(largest_id(part) for part in (train, heldout) if part is not None)
        if largest >= vocab_size:
            raise out_of_vocabulary(f"{key}: {cache_dir} holds the token id", largest, vocab_size)
    splits = [
        _with_documents(part, Path(cache_dir) / f"{split}.arrow", metadata["context_length"], document_mask)
        for split, part in zip(SPLITS, (train, heldout))
    ]
    return Chunks(*splits, metadata)


def _with_documents(dataset, file: Path, length: int, document_mask: bool | str):
    """A split with its documents if they are to be read one by one, else without. Raises DataError
    if it does not record them, or not as tokens of its chunks."""
    import numpy

    if dataset is None:
        return None
    if DOCUMENT_LENGTHS not in dataset.column_names:
        if document_mask is True:
            raise DataError(
                f"data.document_mask: true, but {file} does not record where documents begin; make the chunks again "
                "with preprocess_chunk.py --tokenized_dataset_path, or set it to false"
            )
        return dataset
    if not document_mask:
        return dataset.remove_columns(DOCUMENT_LENGTHS)
    row = 0
    for part in dataset.data.column(DOCUMENT_LENGTHS).chunks:
        lengths = part.flatten().to_numpy(zero_copy_only=False)
        offsets = part.offsets.to_numpy() - part.offsets[0].as_py()
        total = numpy.concatenate(([0], lengths.cumsum(dtype="int64")))
        not_positive = numpy.concatenate(([0], (lengths < 1).cumsum()))
        bad = (
            (numpy.diff(total[offsets]) > length) | (numpy.diff(not_positive[offsets]) > 0) | (numpy.diff(offsets) < 1)
        )
        if bad.any():
            raise DataError(
                f"{file}: row {row + int(bad.argmax())} of {DOCUMENT_LENGTHS} does not fit a chunk of {length} tokens; "
                f"remove {file.parent} and make the chunks again with preprocess_chunk.py"
            )
        row += len(part)
    return dataset


def open_chunks_for(
    tokenizer,
    vocab_size: int,
    cache_dir: str,
    train_seq_len: int | None = None,
    key: str = "data.cache_dir",
    model_key: str = "teacher_model.name",
    document_mask: bool | str = False,
) -> Chunks:
    """The chunks of `cache_dir`, checked against a tokenizer, and that against the vocabulary of
    the model that the option `model_key` names."""
    check_special_tokens(tokenizer, vocab_size, model_key)
    return open_chunks(cache_dir, train_seq_len, tokenizer_fingerprint(tokenizer), key, vocab_size, document_mask)


def most_documents(dataset, rows: int) -> int:
    """The most documents that `rows` chunks of a split hold, the padding of each counted as one. A
    chunk may be among them twice, where two epochs meet."""
    import numpy
    import pyarrow.compute

    counts = pyarrow.compute.list_value_length(dataset.data.column(DOCUMENT_LENGTHS)).to_numpy() + 1
    ascending = numpy.sort(counts).repeat(2)
    return int(ascending[-rows:].sum())


def largest_id(dataset) -> int:
    """The largest token id in a split of chunks; its Arrow file is read without a copy."""
    parts = dataset.data.column("input_ids").chunks
    arrays = [part.flatten().to_numpy(zero_copy_only=True) for part in parts if len(part)]
    return max(int(array.max()) for array in arrays)


def open_split(folder: Path, split: str, rows: int | None = None):
    """The memory-mapped dataset of a data folder's split. Raises DataError if it cannot be read, or
    the number of its rows is not `rows`."""
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
    """A batch {"input_ids": [B, T] int64}, and what else the rows have: "loss_mask" [B, T] bool; if
    they record their documents "document_ids" [B, T] int32, 0, 1, ... for the tokens of a row's
    documents, PADDING after the last; the teacher's outputs (see teacher_outputs.py). There is no
    attention mask: with one of all ones, FLA's layers would take their slow path."""
    import numpy
    import torch

    ids = numpy.stack([row[INPUT_IDS] for row in rows]).astype("int64")
    batch = {INPUT_IDS: torch.from_numpy(ids)}
    if LOSS_MASK in rows[0]:
        batch[LOSS_MASK] = torch.from_numpy(numpy.stack([row[LOSS_MASK] for row in rows]))
    if DOCUMENT_LENGTHS in rows[0]:
        documents = numpy.full(ids.shape, PADDING, "int32")
        for row, target in zip(rows, documents):
            lengths = numpy.asarray(row[DOCUMENT_LENGTHS])
            target[: lengths.sum()] = numpy.arange(len(lengths)).repeat(lengths)
        batch[DOCUMENT_IDS] = torch.from_numpy(documents)
    for column, kind in TEACHER_COLUMNS.items():
        if column in rows[0]:
            batch[column] = torch.from_numpy(numpy.stack([row[column] for row in rows]).astype(kind))
    return batch


def model_inputs(batch: dict) -> dict:
    """What a model reads of a batch: without what only a loss is of."""
    return {name: tensor for name, tensor in batch.items() if name in (INPUT_IDS, DOCUMENT_IDS)}


def read_batch(dataset, rows) -> dict:
    """The batch of these row numbers of a split of chunks: see `collate`."""
    columns = dataset[list(rows)]
    return collate([dict(zip(columns, values)) for values in zip(*columns.values())])


def split_batch(batch: dict, size: int) -> list[dict]:
    """A batch in parts of `size` rows; the last may be smaller."""
    parts = zip(*(tensor.split(size) for tensor in batch.values()))
    return [dict(zip(batch, part)) for part in parts]
