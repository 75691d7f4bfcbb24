"""data.mixture: what it may be, and which stores may stand in one batch."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from synthetic_stores import write_synthetic_store

from sparsekd.logit_store.synthetic import synthetic_manifest
from sparsekd.trainer.config.checks import shared_objective
from sparsekd.trainer.config.compose import check_for_verb, compose_config
from sparsekd.trainer.config.mixture import check_alike, requested_stores
from sparsekd.trainer.config.schema import DataConfig, ObjectiveConfig, StoreConfig
from sparsekd.trainer.run.errors import ConfigError, UserError


def test_one_store_or_a_mixture_by_name() -> None:
    (only,) = requested_stores(StoreConfig(path="a/store"), DataConfig())
    assert (only.key, only.name, only.path, only.weight) == ("store.path", "", "a/store", None)
    mixture = {"web": {"path": "w", "weight": 3}, "code": {"path": "s3://c/store", "weight": 0.5}}
    found = requested_stores(StoreConfig(), DataConfig(mixture=mixture))
    assert [(each.key, each.path, each.weight) for each in found] == [
        ("data.mixture.code", "s3://c/store", 0.5),
        ("data.mixture.web", "w", 3.0),
    ]


@pytest.mark.parametrize(
    ("mixture", "told"),
    [
        ({"a": "runs/a"}, r"data\.mixture\.a is runs/a, expected the form \{path"),
        ({"a": {"weight": 1}}, "expected the form"),
        ({"a": {"path": "x", "share": 1}}, "expected the form"),
        ({"a": {"path": 3}}, r"data\.mixture\.a\.path is 3, expected"),
        ({"a": {"path": ""}}, r"path is '', expected"),
        ({"a": {"path": "x", "weight": 0}}, r"weight is 0, expected a number above 0"),
        ({"a": {"path": "x", "weight": -1}}, "above 0"),
        ({"a": {"path": "x", "weight": float("nan")}}, "above 0"),
        ({"a": {"path": "x", "weight": float("inf")}}, "above 0"),
        ({"a": {"path": "x", "weight": 10**400}}, "above 0"),
        ({"a": {"path": "x", "weight": True}}, "above 0"),
        ({"a": {"path": "x", "weight": "much"}}, "above 0"),
        ({"a": {"path": "x", "weight": 1}, "b": {"path": "y"}}, "gives a weight to a alone"),
        ({"../a": {"path": "x"}}, r"a source named '\.\./a'; a name is"),
        ({"": {"path": "x"}}, "a source named ''"),
        ({7: {"path": "x"}}, "a source named '7'"),
        ({f"s{number}": {"path": "x"} for number in range(257)}, "257 sources, at most 256"),
    ],
)
def test_what_no_mixture_is(mixture: dict[Any, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        requested_stores(StoreConfig(), DataConfig(mixture=mixture))


def test_not_both() -> None:
    with pytest.raises(ConfigError, match=r"store\.path=a and data\.mixture \(b\) are both set"):
        requested_stores(StoreConfig(path="a"), DataConfig(mixture={"b": {"path": "b"}}))
    with pytest.raises(ConfigError, match=r"store\.path is not set.*data\.mixture"):
        requested_stores(StoreConfig(), DataConfig())


def test_plan_is_for_one_store() -> None:
    config = compose_config(["data.mixture={a: {path: x}, b: {path: y}}"])
    with pytest.raises(ConfigError, match=r"plan speaks of one store, but data\.mixture names 2"):
        check_for_verb(config, "plan")


def test_rows_of_one_batch_are_alike() -> None:
    one = synthetic_manifest(vocabulary_size=50, sequence_length=8, k=3, n=5)
    other = synthetic_manifest(vocabulary_size=50, sequence_length=8, k=1, n=9, temperatures=(1.0, 3.0))
    check_alike({"a": one, "b": other})
    tokens = synthetic_manifest(vocabulary_size=50, sequence_length=8, k=0, n=0)
    check_alike({"a": one, "b": tokens})
    tokenizer = replace(one.tokenizer, digest="0" * 64)
    record = replace(one.record, draw_temperature=2.0)
    for what, manifest in {
        "sequence length": replace(one, sequence_length=16),
        "target": replace(one, target="class", outcomes=tuple("abcdefghij")),
        "tokenizer digest": replace(one, tokenizer=tokenizer),
        "tokenizer vocabulary_size": replace(one, tokenizer=replace(one.tokenizer, vocabulary_size=51)),
        "draw temperature": replace(one, record=record),
    }.items():
        with pytest.raises(ConfigError, match=rf"data\.mixture: a and b differ in {what} \("):
            check_alike({"a": one, "b": manifest})
    check_alike({"a": one, "b": replace(one, tokenizer=replace(one.tokenizer, name="elsewhere"))})


def test_one_objective_for_all() -> None:
    drawn, top = (synthetic_manifest(k=4, n=n).record for n in (6, 0))
    with pytest.raises(ConfigError, match=r"target_mode=auto is sampled for a and tail_bucket for b, "):
        shared_objective(ObjectiveConfig(), {"a": drawn, "b": top})
    found = shared_objective(ObjectiveConfig(target_mode="tail_bucket"), {"a": drawn, "b": top})
    assert found.target_mode == "tail_bucket"
    with pytest.raises(ConfigError, match=r"data\.mixture\.b: objective: .*draws"):
        shared_objective(ObjectiveConfig(target_mode="sampled"), {"a": drawn, "b": top})
    with pytest.raises(ConfigError, match=r"^objective: "):
        shared_objective(ObjectiveConfig(target_mode="sampled"), {"": top})


def test_train_looks_at_every_store_before_torch(tmp_path: Path) -> None:
    for name, length in (("a", 8), ("b", 8), ("long", 16)):
        manifest = synthetic_manifest(sequence_length=length, rows_per_shard=4)
        write_synthetic_store(tmp_path / name, manifest, {"train": 4}, seed=1)

    def check(**names: str) -> None:
        inner = ", ".join(
            f"{name}: {{path: {tmp_path / folder}, weight: 0.5}}" for name, folder in names.items()
        )
        config = compose_config([f"data.mixture={{{inner}}}", "student.config={model_type: llama}"])
        check_for_verb(config, "train")

    check(x="a", y="b")
    with pytest.raises(UserError, match=r"data\.mixture\.y=.*/bb is not an existing folder.*did you mean"):
        check(x="a", y="bb")
    with pytest.raises(ConfigError, match="x and y differ in sequence length"):
        check(x="a", y="long")
