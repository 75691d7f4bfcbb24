"""The folder of answers after kills: what is whole stays, what was torn is asked for again."""

import json
from pathlib import Path

import pytest

from sparsekd.trainer.generation.answers import Reply, Task, message_of, seed_of
from sparsekd.trainer.generation.folder import AnswerFolder
from sparsekd.trainer.generation.prompts import Prompt
from sparsekd.trainer.run.errors import UserError

PROMPTS = [
    Prompt([{"role": "user", "content": text}], None, f"{number:064x}", f"p.jsonl:{number}")
    for number, text in enumerate("abcde")
]


def opened(path: Path) -> AnswerFolder:
    return AnswerFolder(path, {"seed": 3}, PROMPTS, answers=2, seed=3, prompts_per_part=2)


def missing(folder: AnswerFolder) -> list[Task]:
    tasks = [task for part in folder.open_parts() for task in folder.tasks(part)]
    return [task for task in tasks if not folder.is_written(task)]


def answer(folder: AnswerFolder, task: Task) -> None:
    folder.add(task, Reply(message_of(f"answer {task.seed}"), "stop", "m"))


def raw(path: Path) -> dict[str, bytes]:
    return {place.name: place.read_bytes() for place in sorted((path / "raw").iterdir())}


def test_any_order_and_a_kill_in_the_middle_of_each_line_give_the_same_files(tmp_path: Path) -> None:
    quiet = opened(tmp_path / "quiet")
    for task in missing(quiet):
        answer(quiet, task)
    assert quiet.written == quiet.total == 10 and list(raw(tmp_path / "quiet")) == [
        f"part-0000{part}.jsonl" for part in range(3)
    ]
    path = tmp_path / "killed"
    for left in range(10, 0, -1):
        folder = opened(path)  # a new process, each time
        tasks = missing(folder)
        assert len(tasks) == left and folder.written == 10 - left
        answer(folder, tasks[(left * 7) % left if left < 3 else (left * 3) % left])
        for journal in (path / "raw").glob("*.journal"):
            line = journal.read_bytes().splitlines()[-1]
            with journal.open("ab") as file:  # the next answer's line, cut short
                file.write(line[: 1 + left * 9])
    assert opened(path).open_parts() == []
    assert raw(path) == raw(tmp_path / "quiet")


def test_a_kill_between_the_whole_part_and_its_journal_s_end(tmp_path: Path) -> None:
    folder = opened(tmp_path / "a")
    tasks = folder.tasks(0)
    for task in tasks[:3]:
        answer(folder, task)
    journal = (tmp_path / "a" / "raw" / "part-00000.journal").read_bytes()
    answer(folder, tasks[3])
    (tmp_path / "a" / "raw" / "part-00000.journal").write_bytes(journal)
    again = opened(tmp_path / "a")
    assert list(raw(tmp_path / "a")) == ["part-00000.jsonl"]
    assert again.is_written(tasks[3]) and again.open_parts() == [1, 2]
    # All answers are in the journal, and the part was not yet written.
    whole = (tmp_path / "a" / "raw" / "part-00000.jsonl").read_bytes()
    (tmp_path / "a" / "raw" / "part-00000.jsonl").unlink()
    (tmp_path / "a" / "raw" / "part-00000.journal").write_bytes(b"".join(reversed(whole.splitlines(True))))
    last = opened(tmp_path / "a")
    last.finish(0)
    assert raw(tmp_path / "a") == {"part-00000.jsonl": whole}


def test_a_damaged_journal_is_said(tmp_path: Path) -> None:
    folder = opened(tmp_path / "a")
    answer(folder, folder.tasks(1)[0])
    journal = tmp_path / "a" / "raw" / "part-00001.journal"
    journal.write_bytes(b"\0\0\0\n" + journal.read_bytes())
    with pytest.raises(UserError, match=r"part-00001\.journal, line 1 is damaged"):
        opened(tmp_path / "a")


def test_seeds_are_of_prompt_and_number(tmp_path: Path) -> None:
    tasks = [task for part in range(3) for task in opened(tmp_path / "a").tasks(part)]
    assert len({task.seed for task in tasks}) == 10
    assert all(0 <= task.seed < 2**31 for task in tasks)
    assert tasks[1].seed == seed_of(3, PROMPTS[0].digest, 1) != seed_of(4, PROMPTS[0].digest, 1)
    assert json.loads((tmp_path / "a" / "generation.json").read_text()) == {"seed": 3}
