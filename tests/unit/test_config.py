"""Composition: defaults, groups, and one clear sentence for everything that can be mistyped."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from synthetic_stores import write_synthetic_store

from sparsekd.logit_store.manifest import manifest_to_json
from sparsekd.logit_store.synthetic import synthetic_manifest
from sparsekd.trainer.config.compose import as_yaml, check_for_verb, compose_config, groups
from sparsekd.trainer.config.options import options
from sparsekd.trainer.config.schema import Config, run_folder
from sparsekd.trainer.door.cli import VERBS, main
from sparsekd.trainer.run.errors import ConfigError

TRAIN = ["store.path=STORE/tokens", "student=llama_1m"]
CAPTURE = ["store.tokens=STORE/tokens", "store.path=x", "teacher.path=y"]


def test_no_override_gives_the_schema_s_defaults() -> None:
    assert compose_config([]) == Config()


def test_every_choice_of_every_group_composes() -> None:
    for group, choices in groups().items():
        assert choices, f"group {group} has no choices"
        for choice in choices:
            compose_config([f"{group}={choice}"])


def test_every_option_has_a_comment_that_is_a_sentence() -> None:
    keys = [leaf.key for leaf in options()]
    assert len(keys) == len(set(keys))
    for leaf in options():
        assert leaf.comment.endswith("."), leaf.key


def test_override_group_and_experiment_win_in_this_order() -> None:
    config = compose_config(["experiment=demo", "objective=ce_only", "run.name=ce", "train.steps=7"])
    assert (config.objective.kd_weight, config.objective.ce_weight) == (0.0, 1.0)
    assert run_folder(config) == "runs/demo/ce"
    assert config.train.steps == 7
    assert config.store.path == "runs/demo/store"
    assert compose_config(["experiment=demo", "run.root=elsewhere"]).store.tokens == "elsewhere/tokens"


def test_demo_teacher_differs_from_the_demo_only_in_what_it_trains() -> None:
    demo, teacher = compose_config(["experiment=demo"]), compose_config(["experiment=demo_teacher"])
    changed = {
        item.name
        for item in dataclasses.fields(Config)
        if getattr(demo, item.name) != getattr(teacher, item.name)
    }
    assert changed <= {"run", "store", "student", "objective", "optimizer", "train"}
    assert demo.store.tokens == teacher.store.tokens == teacher.store.path


def test_configuration_survives_its_own_yaml(tmp_path: Path) -> None:
    config = compose_config(["experiment=demo"])
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "again.yaml").write_text("# @package _global_\n" + as_yaml(config))
    assert compose_config(["experiment=again"], config_directory=str(tmp_path)) == config


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "objective.kd_wieght=1",
            ["objective.kd_wieght", "did you mean 'objective.kd_weight'", "temperature"],
        ),
        ("steps=5", ["'steps'", "did you mean 'train.steps'"]),
        ("nonsense=5", ["nonsense", "Sections:", "objective"]),
        ("objective=ce_onyl", ["objective=ce_onyl", "did you mean ce_only", "kd_ce"]),
        ("experiment=dmeo", ["did you mean demo"]),
        ("train.steps=many", ["train.steps", "many", "int"]),
        ("train.steps=0", ["train.steps=0", "at least 1"]),
        ("engine.zero_stage=4", ["engine.zero_stage=4", "0 to 3"]),
        ("engine.dtype=fp16", ["engine.dtype=fp16", "bfloat16, float32"]),
        ("optimizer.betas=[0.9,1.5]", ["optimizer.betas", "0 to 1"]),
        ("objective.divergence=kl", ["objective.divergence=kl", "forward_kl"]),
        ("objective.target_mode=tail_buckett", ["did you mean tail_bucket"]),
        ("objective.mixture=1.5", ["objective.mixture=1.5", "0 to 1"]),
        ("store.codec=zip", ["store.codec=zip", "exact"]),
        ("train=5", ["whole section", "steps"]),
        ("corpus.paths=docs", ["corpus.paths", "[first,second]"]),
        ("train.steps", ["'train.steps'", "key=value"]),
        ("train.steps=1,2", ["sweep"]),
    ],
)
def test_a_mistake_is_one_sentence_that_names_what_is_legal(override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        compose_config([override])
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize(
    ("verb", "overrides", "words"),
    [
        ("prepare", [], ["corpus.paths is not set"]),
        ("prepare", ["corpus.paths=[x]", "store.tokens=y"], ["corpus.tokenizer", "neither is set"]),
        (
            "capture",
            ["store.tokens=STORE/tokens", "store.path=x", "teacher.path=STORE/token"],
            ["teacher.path=STORE/token", "did you mean STORE/tokens"],
        ),
        ("capture", ["store.tokens=STORE/tokns"], ["STORE/tokns", "did you mean", "STORE/tokens"]),
        (
            "capture",
            ["store.tokens=STORE/tokens", "store.path=x", "teacher.path=y", "store.k=0", "store.n=0"],
            ["store.k=0"],
        ),
        (
            "capture",
            ["store.tokens=STORE/tokens", "store.path=x", "teacher.path=y", "store.draw_temperature=3"],
            ["draw_temperature=3", "[1.0, 2.0, 4.0]"],
        ),
        ("capture", [*CAPTURE, "store.n=0", "store.draw_temperature=3"], ["draw_temperature=3"]),
        (
            "capture",
            [*CAPTURE, "store.temperatures=[2,1,1]"],
            ["temperatures=[2.0, 1.0, 1.0] is not ascending", "[1.0, 2.0]"],
        ),
        ("train", [], ["store.path is not set"]),
        ("train", ["store.path=STORE/tokens"], ["student.path"]),
        ("train", [*TRAIN, "objective.kd_weight=0"], ["kd_weight and ce_weight are both 0"]),
        ("train", [*TRAIN, "engine.zero_stage=0"], ["zero_stage=0", "float32"]),
        (
            "train",
            [*TRAIN, "engine.zero_stage=0", "engine.dtype=float32", "train.nonfinite=skip"],
            ["train.nonfinite=skip needs engine.zero_stage 1, 2 or 3", "train.nonfinite=stop"],
        ),
        (
            "train",
            [*TRAIN, "engine.zero_stage=2", "engine.offload=cpu", "train.nonfinite=skip"],
            ["train.nonfinite=skip with engine.offload=cpu needs engine.zero_stage=3, found 2"],
        ),
        (
            "train",
            [*TRAIN, "engine.zero_stage=0", "engine.dtype=float32", "engine.offload=cpu"],
            ["offload=cpu"],
        ),
        ("train", [*TRAIN, "+engine.deepspeed.gradient_clipping=2"], ["engine.deepspeed.gradient_clipping"]),
        ("train", [*TRAIN, "schedule.warmup_steps=1000"], ["warmup_steps=1000", "train.steps=1000"]),
        ("train", [*TRAIN, "student.path=y"], ["student.path=y", "student.config", "both set"]),
        ("train", [*TRAIN, "objective.temperature=3"], ["needs temperature=1", "found 3"]),
        (
            "train",
            [*TRAIN, "objective.divergence=reverse_kl"],
            ["'reverse_kl' is not defined", "tail_bucket"],
        ),
        (
            "train",
            [*TRAIN, "objective=jensen_shannon", "objective.mixture=0"],
            ["mixture is 0.0", "(0, 1)", "jensen_shannon"],
        ),
        (
            "train",
            [*TRAIN, "objective.target_mode=tail_bucket", "objective.temperature=5"],
            ["temperature is 5", "1, 2, 4", "from 1 to 4", "capture again"],
        ),
        ("train", [*TRAIN, "store.path=STORE/empty"], ["STORE/empty is not a logit store"]),
        ("evaluate", ["store.path=STORE/tokens"], ["evaluate.models is not set"]),
        (
            "evaluate",
            ["store.path=STORE/tokens", "evaluate.models={kd: STORE/tokens}"],
            ["evaluate.baseline=ce", "null"],
        ),
    ],
)
def test_what_a_verb_needs_is_checked_before_anything_is_loaded(
    tmp_path: Path, verb: str, overrides: list[str], words: list[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "MANIFEST.json").write_text(manifest_to_json(synthetic_manifest()))
    config = compose_config([text.replace("STORE", str(tmp_path)) for text in overrides])
    with pytest.raises(ConfigError) as caught:
        check_for_verb(config, verb)
    for word in words:
        assert word.replace("STORE", str(tmp_path)) in str(caught.value)


def test_the_command_line_prints_one_sentence_and_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "objective.kd_wieght=1"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("sparsekd train: 'objective.kd_wieght'")
    assert printed.err.count("\n") == 1
    assert main(["train", "objective.kd_wieght=1", "--traceback"]) == 2
    assert "Traceback" in capsys.readouterr().err
    assert main(["trian"]) == 2
    assert "'trian' is not a verb" in capsys.readouterr().err
    assert main(["train", "--stpes", "5"]) == 2
    assert "--stpes is not a flag" in capsys.readouterr().err


def test_help_shows_groups_every_key_with_its_comment_and_five_examples(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    for leaf in options():
        if leaf.key.startswith(("train.", "objective.", "engine.", "student.", "tracking.")):
            assert leaf.key in text
            assert leaf.comment in text
    for group in ("objective", "experiment", "engine"):
        assert ", ".join(groups()[group]) in text
    examples = text[text.index("examples:") :]
    assert sum(line.startswith(("  sparsekd", "  torchrun")) for line in examples.splitlines()) == 5


def test_help_of_every_verb_names_what_it_reads_and_the_choices(capsys: pytest.CaptureFixture[str]) -> None:
    shown = {}
    for verb in VERBS:
        assert main([verb, "--help"]) == 0
        shown[verb] = capsys.readouterr().out
    assert main(["store", "verify", "--help"]) == 0
    shown["store"] += capsys.readouterr().out
    assert "corpus.sequence_length" in shown["plan"]
    assert "evaluate.dtype" in shown["report"] and "student.attention" in shown["report"]
    for verb in ("capture", "store", "evaluate", "report", "export"):
        assert "engine.timeout_minutes" in shown[verb] and "engine.zero_stage" not in shown[verb]
    assert "[forward_kl | reverse_kl" in shown["train"] and "[auto | tail_bucket" in shown["train"]
    assert "exact" in shown["capture"]


def test_a_store_s_checks_take_no_settings(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["inspect", "x", "foo=1"], ["verify", "x", "train.steps=5"]):
        assert main(["store", *words]) == 2
        assert f"takes no settings, found {words[-1]}" in capsys.readouterr().err
    assert main(["store", "inspect", "x", "--teacher"]) == 2
    assert "--teacher belongs to store verify" in capsys.readouterr().err


def test_one_rank_says_what_was_typed_wrong_and_one_of_each_machine_what_is_not_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(rank: int, local_rank: int, word: str) -> str:
        # As srun sets them.
        for name, value in {
            "PROCID": rank,
            "LOCALID": local_rank,
            "STEP_ID": 0,
            "NTASKS": 4,
            "NODEID": rank // 2,
            "STEP_TASKS_PER_NODE": "2(x2)",
            "JOB_ID": 1,
        }.items():
            monkeypatch.setenv(f"SLURM_{name}", str(value))
        monkeypatch.setenv("SLURM_STEP_NODELIST", "n[1-2]")
        assert main(["train", word]) == 2
        return capsys.readouterr().err

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    typed = [said(rank, rank % 2, "train.steps=0") for rank in range(4)]
    assert [bool(text) for text in typed] == [True, False, False, False]
    missing = [said(rank, rank % 2, "store.path=no/such/folder") for rank in range(4)]
    assert [bool(text) for text in missing] == [True, False, True, False]
    assert missing[0].startswith("sparsekd train: store.path") and "train: rank 2: store.path" in missing[2]


def test_ctrl_c_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("sparsekd.trainer.door.cli._dispatch", interrupted)
    assert main(["train"]) == 130


def test_a_training_run_s_settings_are_checked_without_torch(tmp_path: Path) -> None:
    (tmp_path / "MANIFEST.json").write_text(manifest_to_json(synthetic_manifest()))
    words = ["train", f"store.path={tmp_path}", "student=llama_1m", "objective.temperature=3"]
    code = (
        f"from sparsekd.trainer.door.cli import main; assert main({words!r}) == 2\n"
        "import sys; assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0 and "needs temperature=1" in done.stderr, done.stderr


def test_store_verbs_end_with_the_next_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = tmp_path / "store"
    write_synthetic_store(store, synthetic_manifest(), {"train": 2, "heldout": 1}, seed=0)
    assert main(["store", "inspect", str(store)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"next: sparsekd store verify {store}"
    assert main(["store", "verify", str(store)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"next: sparsekd train store.path={store}")
