"""The folder of answers: what they are answers to, the answers as they came, and what is still to be asked.

An answer is a line in its part's journal from the moment it came. A part whose answers are all there is
written whole, in the order of prompts and numbers, and its journal goes. So the finished files do not tell
when an answer came, nor how often the command was started.
"""

import json
import os
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

from sparsekd.logit_store.errors import first_line
from sparsekd.logit_store.json_text import canonical_json
from sparsekd.trainer.generation.answers import Reply, Task, answer_of, line_of, seed_of
from sparsekd.trainer.generation.prompts import Prompt
from sparsekd.trainer.run.errors import ConfigError, DataError, writing
from sparsekd.trainer.run.files import write_whole

IDENTITY_NAME = "generation.json"
RAW_NAME = "raw"
_JOURNAL_SUFFIX = ".journal"


class AnswerFolder:
    """The answers that are there and those that are not.

    Args:
        path: The folder; made where it is not there.
        identity: What the answers depend on, as JSON values.
        prompts: All prompts.
        answers: To each prompt.
        seed: Of all.
        prompts_per_part: Prompts whose answers stand in one file.

    Raises:
        ConfigError: The folder holds answers of another identity.
        DataError: A journal is damaged elsewhere than at its end.
        UserError: The folder cannot be written.
    """

    def __init__(
        self,
        path: Path,
        identity: dict[str, Any],
        prompts: list[Prompt],
        *,
        answers: int,
        seed: int,
        prompts_per_part: int,
    ) -> None:
        self.path, self.raw = path, path / RAW_NAME
        self._prompts, self._answers, self._seed = prompts, answers, seed
        self._per_part = prompts_per_part
        self._lines: dict[int, dict[tuple[str, int], str]] = {}
        with writing(path):
            self.raw.mkdir(parents=True, exist_ok=True)
            _require_identity(path / IDENTITY_NAME, identity)
        for part in range(self.parts):
            if self._whole(part).is_file():
                self._journal(part).unlink(missing_ok=True)
            else:
                self._lines[part] = _read_journal(
                    self._journal(part), {task.key for task in self.tasks(part)}
                )

    @property
    def parts(self) -> int:
        """How many files there will be."""
        return -(-len(self._prompts) // self._per_part)

    @property
    def total(self) -> int:
        """Answers that are asked for."""
        return len(self._prompts) * self._answers

    @property
    def written(self) -> int:
        """Answers that are there."""
        return self.total - sum(self._wanted(part) - len(lines) for part, lines in self._lines.items())

    def tasks(self, part: int) -> list[Task]:
        """All answers of a part, in the order in which they will stand there."""
        first = part * self._per_part
        return [
            Task(part, prompt, sample, seed_of(self._seed, prompt.digest, sample))
            for prompt in self._prompts[first : first + self._per_part]
            for sample in range(self._answers)
        ]

    def open_parts(self) -> list[int]:
        """The parts of which answers are missing, or that are not written whole."""
        return sorted(self._lines)

    def is_written(self, task: Task) -> bool:
        """Whether an answer is there."""
        return task.part not in self._lines or task.key in self._lines[task.part]

    def add(self, task: Task, reply: Reply) -> None:
        """Keeps an answer, and writes its part whole where it was the last.

        Raises:
            UserError: It cannot be written.
        """
        line = line_of(task, reply)
        lines = self._lines[task.part]
        assert task.key not in lines, "an answer that is there was asked for again"
        journal = self._journal(task.part)
        # Closed each time: parts are many, and one write is one line or a torn one at the end.
        with writing(journal), journal.open("a", encoding="ascii") as file:
            file.write(line + "\n")
        lines[task.key] = line
        self.finish(task.part)

    def finish(self, part: int) -> None:
        """Writes a part whole, if all of its answers are there.

        Raises:
            UserError: It cannot be written.
        """
        lines = self._lines.get(part)
        if lines is None:
            return
        if len(lines) < self._wanted(part):
            return
        whole, tasks = self._whole(part), self.tasks(part)
        with writing(whole):
            write_whole(whole, "".join(f"{lines[task.key]}\n" for task in tasks))
            self._journal(part).unlink(missing_ok=True)
        del self._lines[part]

    def records(self) -> Iterator[dict[str, Any]]:
        """All answers of finished parts, in their order.

        Raises:
            DataError: A file is damaged.
        """
        for part in range(self.parts):
            place = self._whole(part)
            with place.open(encoding="ascii") as file:
                for number, line in enumerate(file, start=1):
                    try:
                        yield answer_of(line)
                    except (ValueError, RecursionError) as error:
                        raise DataError(
                            f"{place}, line {number} is damaged ({first_line(error)[:200]}); remove the "
                            "file, and the same command asks for its answers again."
                        ) from error

    def _wanted(self, part: int) -> int:
        """Answers of a part."""
        return min(self._per_part, len(self._prompts) - part * self._per_part) * self._answers

    def _whole(self, part: int) -> Path:
        return self.raw / f"part-{part:05d}.jsonl"

    def _journal(self, part: int) -> Path:
        return self.raw / f"part-{part:05d}{_JOURNAL_SUFFIX}"


def _require_identity(place: Path, identity: dict[str, Any]) -> None:
    """Writes what the answers depend on, or compares it with what a folder's answers depend on."""
    try:
        found = json.loads(place.read_text("utf-8"))
    except FileNotFoundError:
        write_whole(place, canonical_json(identity))
        return
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{place} is damaged; take another generate.path.") from error
    # As it is read again: tuples are lists there.
    wanted = json.loads(canonical_json(identity))
    if found == wanted:
        return
    names = [name for name in wanted if not isinstance(found, dict) or found.get(name) != wanted[name]]
    name = names[0] if names else "version"
    before = found.get(name) if isinstance(found, dict) else None
    raise ConfigError(
        f"{place.parent} holds answers under other settings: {name} is {before!r} there and "
        f"{wanted.get(name)!r} now; take another generate.path, or the settings of before."
    )


def _read_journal(place: Path, keys: Set[tuple[str, int]]) -> dict[tuple[str, int], str]:
    """The lines of a journal; a line that was torn by a kill is cut off the file.

    Args:
        place: Of the journal.
        keys: Of the answers that belong there.

    Raises:
        DataError: It is damaged elsewhere.
    """
    try:
        data = place.read_bytes()
    except FileNotFoundError:
        return {}
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with writing(place):
            os.truncate(place, whole)
    lines = {}
    for number, line in enumerate(data[:whole].splitlines(), start=1):
        try:
            record = answer_of(line)
            key = record["prompt"], record["sample"]
            if key not in keys:
                raise ValueError("it answers nothing that is asked for here")
            lines[key] = line.decode("ascii")
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{place}, line {number} is damaged ({first_line(error)[:200]}); remove the line, and its "
                "answer is asked for again."
            ) from error
    return lines
