"""The results of a checkpoint on disk: which are there, which are out of date, what crashed."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

from runtime.checkpoints import fingerprint, sha256
from runtime.data import data_fingerprint, read_metadata
from runtime.files import atomic_write_text

from recall_tasks import RECALL_TASKS

from .options import Options, labels, option_error, path_parts
from .tasks import HELDOUT, KL, RECALL_GENERATION, Unit

PROCEDURE = 2  # increase it when what is measured changes: older results are then measured again


class Record:
    """A checkpoint's results.json, and beside it what must survive a crash.

    `.running` holds the units that run, `.died` the error that ended their process, and
    `.hashes.json` the hashes of weights that were read.
    """

    def __init__(self, options: Options, checkpoint: str):
        self.options = options
        self.checkpoint = checkpoint
        self.folder = options.output / "__".join(path_parts(checkpoint))
        self.file = self.folder / "results.json"
        self.running = self.folder / ".running"
        self.died = self.folder / ".died"
        self.hashes = self.folder / ".hashes.json"
        try:
            self.results = json.loads(self.file.read_text())["tasks"] if self.file.is_file() else {}
        except (ValueError, KeyError, TypeError):
            problem = "holds no results of ours; remove it, or name another folder"
            raise option_error("output", f"{self.file} {problem}") from None

    # -------------------------------------------------------------------- what a result depends on
    def fingerprint(self, checkpoint: str) -> str:
        """Of a folder: a hash of its config and weights. Of a hub name: the name."""
        folder = Path(checkpoint)
        return fingerprint(folder, self.sha256) if folder.is_dir() else checkpoint

    def sha256(self, file: Path) -> str:
        """The hash of a file's content, which may have many gigabytes: it is read again only when
        its size or time has changed."""
        try:
            known = json.loads(self.hashes.read_text())
        except (FileNotFoundError, ValueError):
            known = {}
        name = str(file.resolve())
        stat = file.stat()
        state = [stat.st_size, stat.st_mtime_ns]
        *known_state, digest = known.get(name) or (None,)
        if known_state != state:
            digest = sha256(file)
            self.folder.mkdir(parents=True, exist_ok=True)
            known[name] = [*state, digest]
            atomic_write_text(self.hashes, json.dumps(known, indent=1) + "\n")
        return digest

    def settings(self, unit: Unit) -> dict:
        """What a result depends on, besides its unit."""
        settings = {"checkpoint": self.fingerprint(self.checkpoint), "limit": self.options.limit}
        if unit.task not in HELDOUT:  # these have had one procedure only
            settings["procedure"] = PROCEDURE
        if unit.task in (*RECALL_TASKS, RECALL_GENERATION):
            settings["num_words"] = self.options.num_words
        if unit.task in HELDOUT:
            settings["data"] = data_fingerprint(read_metadata(self.options.data))
            if self.options.document_mask:  # older results have no such setting
                settings["document_mask"] = True
        if unit.task == KL:
            settings["teacher"] = self.fingerprint(self.options.teacher)
        return settings

    # ------------------------------------------------------------------------------------- results
    def is_done(self, unit: Unit) -> bool:
        """Whether the unit has a score that was measured with these settings."""
        result = self.results.get(unit.key)
        return bool(result) and "error" not in result and result["settings"] == self.settings(unit)

    def put(self, unit: Unit, result: dict) -> None:
        """Records a score or an error, at once on disk."""
        identity = {"task": unit.task, "seq_len": unit.seq_len}
        self.results[unit.key] = {**identity, **result, "settings": self.settings(unit)}
        self.write()

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        versions = {name: version(name) for name in ("lm_eval", "transformers", "torch")}
        content = {"checkpoint": self.checkpoint, "versions": versions, "tasks": self.results}
        atomic_write_text(self.file, json.dumps(content, indent=1) + "\n")

    def clear(self, units: list[Unit]) -> list[Unit]:
        """Drops results of units that failed or were measured with other settings; returns the
        units that are to be run."""
        todo = [unit for unit in units if not self.is_done(unit)]
        for unit in todo:
            self.results.pop(unit.key, None)
        self.end()
        return todo

    # ------------------------------------------------------------------------------------- crashes
    def begin(self, units: list[Unit]) -> None:
        """Notes that these units run now."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.running.write_text(json.dumps([unit.key for unit in units]))

    def end(self) -> None:
        """Notes that nothing runs."""
        self.running.unlink(missing_ok=True)
        self.died.unlink(missing_ok=True)

    def record_crashes(self, units: list[Unit]) -> bool:
        """Records the units as failed that ran when the processes ended; returns whether there
        were any."""
        keys = json.loads(self.running.read_text()) if self.running.is_file() else []
        why = "a process was killed, perhaps for memory"
        if self.died.is_file():
            why = self.died.read_text()
        for unit in units:
            if unit.key in keys:
                self.put(unit, {"error": why})
        self.end()
        return bool(keys)


def results_of(options: Options, units: list[Unit]) -> dict[str, dict[str, dict]]:
    """Label -> unit's key -> result, of these units; one that has not run is absent."""
    results = {}
    for checkpoint, label in labels(options.checkpoints).items():
        recorded = Record(options, checkpoint).results
        results[label] = {unit.key: recorded[unit.key] for unit in units if unit.key in recorded}
    return results
