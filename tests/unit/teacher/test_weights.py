"""The teacher's fingerprint: every byte and name of what makes its logits, and nothing else."""

from pathlib import Path

import pytest

from sparsekd.trainer.config.schema import TeacherConfig
from sparsekd.trainer.models.weights import model_folder, weights_digest
from sparsekd.trainer.run.errors import ModelError
from sparsekd.trainer.teacher.weights import teacher_identity, teacher_name


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


FILES = {"config.json": b'{"model_type": "llama"}', "a.safetensors": b"one", "b.safetensors": b"two"}


def test_digest_depends_on_names_and_bytes_alone(tmp_path: Path) -> None:
    base = weights_digest(write(tmp_path / "a", FILES))
    assert base == weights_digest(write(tmp_path / "elsewhere" / "b", dict(reversed(FILES.items()))))
    changes: list[dict[str, bytes]] = [
        FILES | {"a.safetensors": b"onE"},
        FILES | {"a.safetensors": b"onet", "b.safetensors": b"wo"},
        FILES | {"config.json": b"{ }"},
        {"config.json": b"{}", "a.safetensors": b"one", "c.safetensors": b"two"},
        FILES | {"modeling_own.py": b"pass"},
    ]
    digests = {weights_digest(write(tmp_path / f"c{index}", files)) for index, files in enumerate(changes)}
    assert len(digests | {base}) == len(changes) + 1
    unrelated = FILES | {"README.md": b"x", "tokenizer.json": b"{}", "pytorch_model.bin": b"old"}
    assert weights_digest(write(tmp_path / "d", unrelated)) == base


def test_older_weights_count_where_there_are_no_newer_ones(tmp_path: Path) -> None:
    left = weights_digest(write(tmp_path / "a", {"config.json": b"{}", "pytorch_model.bin": b"1"}))
    right = weights_digest(write(tmp_path / "b", {"config.json": b"{}", "pytorch_model.bin": b"2"}))
    assert left != right


def test_problems_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no \*\.safetensors and no \*\.bin"):
        weights_digest(write(tmp_path / "a", {"config.json": b"{}"}))
    with pytest.raises(ModelError, match=r"has no config\.json"):
        model_folder(str(write(tmp_path / "b", {"x": b""})), None, key="teacher")


def test_identity_holds_what_decides_bits_and_no_place(tmp_path: Path) -> None:
    folder = write(tmp_path / "teacher", FILES)
    config = TeacherConfig(path=str(folder))

    def identity(device_type: str = "cpu", threads: int = 1, **changes: object) -> str:
        settings = TeacherConfig(**(vars(config) | changes))
        found = teacher_identity(
            settings, str(folder), device_type=device_type, threads=threads, revision=None
        )
        assert str(tmp_path) not in repr(found)
        return repr(found)

    assert (
        teacher_name(str(folder)) == "teacher" and teacher_name("organisation/model") == "organisation/model"
    )
    variants = [
        identity(),
        identity(threads=2),
        identity(device_type="cuda"),
        identity(micro_batch_rows=3),
        identity(chunk_positions=3),
        identity(impl="torch"),
        identity(impl="triton"),
        identity(attention="eager"),
        identity(dtype="float32"),
    ]
    assert len(set(variants)) == len(variants)
    assert identity(device_type="cuda", threads=2) == identity(device_type="cuda")
