"""evaluate against a dense float64 computation of its figures, from stored records and with the teacher."""

import json
import shutil
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
from transformers import LlamaForCausalLM, PreTrainedModel

from sparsekd.logit_store.protocol.reader import open_store
from sparsekd.trainer.config.places import evaluation_folder
from sparsekd.trainer.config.schema import Config
from sparsekd.trainer.models import opened
from sparsekd.trainer.quality import evaluate
from sparsekd.trainer.quality.result import Evaluation, load_evaluation
from sparsekd.trainer.quality.table import headline, result_table
from sparsekd.trainer.run.errors import ConfigError, DataError, ModelError

sys.path.insert(0, str(Path(__file__).parent))
from quality_world import log_probabilities, make_world

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder, k=4, n=6)
    return folder


def _config(world: Path, **evaluate_options: object) -> Config:
    config = Config()
    config.run.root = str(world)
    config.store.path = str(world / "store")
    config.launch.device = "cpu"
    config.evaluate.models = {"ce": str(world / "ce"), "kd": str(world / "kd")}
    config.evaluate.bootstrap_samples = 500
    config.evaluate.micro_batch_rows = 3
    for name, value in evaluate_options.items():
        setattr(config.evaluate, name, value)
    return config


def _run(config: Config) -> Evaluation:
    evaluate.run(config)
    return load_evaluation(evaluation_folder(config))


@pytest.fixture(scope="module")
def oracle(world: Path) -> dict[str, dict[str, float]]:
    """Every figure from its definition, in float64, over all counted positions."""
    store = open_store(world / "store")
    rows = [store.read_row("heldout", index) for index in range(store.rows("heldout"))]
    vocabulary = store.manifest.tokenizer.vocabulary_size
    counted = np.stack([row.loss_mask for row in rows])
    labels = np.roll(np.stack([row.token_ids for row in rows]), -1, 1)[counted]
    logs = {
        name: log_probabilities(LlamaForCausalLM.from_pretrained(world / name).eval(), rows, vocabulary)[
            counted
        ]
        for name in ("teacher", "kd", "ce")
    }
    p = np.exp(logs["teacher"])
    found = {}
    for name, log_q in logs.items():
        q = np.exp(log_q)
        confidence, top = q.max(-1), q.argmax(-1)
        bins = np.minimum(np.floor(confidence.astype(np.float32) * 15.0), 14)
        calibration = sum(
            abs((top == labels)[bins == one].mean() - confidence[bins == one].mean()) * (bins == one).mean()
            for one in np.unique(bins)
        )
        loss = -log_q[np.arange(len(labels)), labels]
        found[name] = {
            "loss": loss.mean(),
            "perplexity": np.exp(loss.mean()),
            "kl": (p * (logs["teacher"] - log_q)).sum(-1).mean(),
            "agreement": (top == p.argmax(-1)).mean(),
            "acceptance": np.minimum(p, q).sum(-1).mean(),
            "calibration_error": calibration,
        }
    return found


def test_with_the_teacher_every_figure_is_exact(world: Path, oracle: dict[str, dict[str, float]]) -> None:
    config = _config(world, teacher="load")
    config.teacher.path = str(world / "teacher")
    result = _run(config)
    assert [model.name for model in result.models] == ["teacher", "kd", "ce"]
    for model in result.models:
        assert {figure.kind for figure in model.figures.values()} == {"exact"}
        for name, value in oracle[model.name].items():
            assert model.figures[name].value == pytest.approx(value, rel=2e-4, abs=1e-5), (model.name, name)
    assert result.teacher_deviation is not None and result.teacher_deviation < 1e-5
    assert result.models[0].parameters == LlamaForCausalLM.from_pretrained(world / "teacher").num_parameters()
    assert not set("~<>") & set(result_table(result))


def test_stored_records_are_exact_estimates_and_bounds(
    world: Path, oracle: dict[str, dict[str, float]]
) -> None:
    result = _run(_config(world))
    for model in result.models:
        wanted, found = oracle[model.name], model.figures
        for name in ("loss", "perplexity", "agreement", "calibration_error"):
            assert found[name].kind == "exact"
            assert found[name].value == pytest.approx(wanted[name], rel=2e-4, abs=1e-5), (model.name, name)
        if model.role == "teacher":
            assert (found["kl"].value, found["acceptance"].value, model.parameters) == (0.0, 1.0, None)
            continue
        assert found["kl"].kind == "estimate"
        assert found["kl"].value == pytest.approx(wanted["kl"], abs=0.05)
        assert found["kl"].value != pytest.approx(wanted["kl"], abs=1e-5)
        assert found["acceptance"].kind == "upper bound"
        assert found["acceptance"].value >= wanted["acceptance"]
    margin = result.margin
    assert margin is not None and margin.low is not None and margin.high is not None
    assert margin.value == pytest.approx(oracle["ce"]["loss"] - oracle["kd"]["loss"], abs=1e-5)
    assert margin.low < margin.value < margin.high
    distance = oracle["ce"]["loss"] - oracle["teacher"]["loss"]
    assert result.gap_closed == pytest.approx(margin.value / distance, abs=1e-4)
    assert f"{margin.value:.4f} nats per token ahead of ce" in headline(result)
    assert sum(result.documents.tokens) == result.store["counted"]
    for breakdown in result.breakdowns:
        assert sum(category.tokens for category in breakdown.categories) == result.store["counted"]
    total = sum(result.documents.nats["kd"]) / sum(result.documents.tokens)
    assert total == pytest.approx(oracle["kd"]["loss"], rel=1e-5)


def test_no_two_models_are_alive_at_one_time(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[weakref.ref] = []
    load = opened.load_causal_lm

    def watched(*arguments: object, **keywords: object) -> PreTrainedModel:
        # Without a collection: a model that only the collector would free is still in memory.
        alive = [number for number, before in enumerate(loaded) if before() is not None]
        assert not alive, f"models {alive} are alive when model {len(loaded)} is loaded"
        model = load(*arguments, **keywords)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(opened, "load_causal_lm", watched)
    config = _config(world, teacher="load", rows=4)
    config.teacher.path = str(world / "teacher")
    _run(config)
    assert len(loaded) == 3


def test_a_model_too_short_for_the_rows_is_refused(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "kd", tmp_path / "short")
    place = tmp_path / "short" / "config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"max_position_embeddings": 95}))
    config = _config(world, models={"kd": str(tmp_path / "short")}, baseline=None)
    with pytest.raises(ModelError, match=r"models\.kd=.*short takes at most 95 positions, .* have 96"):
        _run(config)


def test_worst_tokens_are_where_the_text_is(world: Path) -> None:
    result = _run(_config(world))
    store = open_store(world / "store")
    assert len({token.document for token in result.worst_tokens}) == len(result.worst_tokens) > 3
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(store.tokenizer_path)
    for token in result.worst_tokens:
        row = store.read_row("heldout", token.row)
        assert row.loss_mask[token.position]
        assert tokenizer.decode([int(row.token_ids[token.position + 1])]) == token.token
        assert row.teacher is not None
        assert token.probabilities["teacher"] == pytest.approx(
            float(np.exp(row.teacher.true_logprob[token.position])), rel=1e-4
        )
        assert token.probabilities["kd"] < token.probabilities["teacher"]
    rows = [store.read_row("heldout", index) for index in range(store.rows("heldout"))]
    vocabulary = store.manifest.tokenizer.vocabulary_size
    log_p, log_q = (
        log_probabilities(LlamaForCausalLM.from_pretrained(world / name).eval(), rows, vocabulary)
        for name in ("teacher", "kd")
    )
    following = np.roll(np.stack([row.token_ids for row in rows]), -1, 1)[..., None]
    excess = np.take_along_axis(log_p - log_q, following, -1)[..., 0]
    excess[~np.stack([row.loss_mask for row in rows])] = -np.inf
    worst = result.worst_tokens[0]
    assert (worst.row, worst.position) == np.unravel_index(excess.argmax(), excess.shape)


@pytest.mark.parametrize(
    ("k", "n", "kinds"),
    [
        (0, 6, {"kl": "estimate"}),
        (4, 0, {"kl": "lower bound", "agreement": "exact", "acceptance": "upper bound"}),
        (0, 0, {}),
    ],
)
def test_what_each_record_allows(
    tmp_path: Path, k: int, n: int, kinds: dict[str, str], world: Path, oracle: dict[str, dict[str, float]]
) -> None:
    if k + n:
        make_world(tmp_path, k=k, n=n, documents=12, steps=(8, 4, 2))
        folder, store = tmp_path, tmp_path / "store"
    else:
        folder, store = world, world / "tokens"
    config = _config(folder, path=str(tmp_path / "result"))
    config.store.path = str(store)
    result = _run(config)
    student = result.model("student")
    assert student is not None
    found = {name: figure.kind for name, figure in student.figures.items()}
    own = {"loss": "exact", "perplexity": "exact", "calibration_error": "exact"}
    assert found == own | kinds
    if k + n == 0:
        assert result.model("teacher") is None and result.gap_closed is None
        assert student.figures["loss"].value == pytest.approx(oracle["kd"]["loss"], rel=1e-5)
        assert [item.name for item in result.breakdowns] == ["context"]


def test_what_is_refused(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"evaluate\.student=kdd is not one of"):
        evaluate.run(_config(world, student="kdd"))

    config = _config(world, teacher="load")
    config.teacher.path = str(world / "ce")
    with pytest.raises(ModelError, match="not the teacher that was captured"):
        evaluate.run(config)

    from transformers import LlamaConfig

    small = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(small).save_pretrained(tmp_path / "small")
    with pytest.raises(ModelError, match="has 64 vocabulary entries"):
        evaluate.run(_config(world, models={"kd": str(tmp_path / "small")}, baseline=None))

    for file in (world / "kd").iterdir():
        (tmp_path / "kd").mkdir(exist_ok=True)
        (tmp_path / "kd" / file.name).write_bytes(file.read_bytes())
    place = tmp_path / "kd" / "tokenizer.json"
    described = json.loads(place.read_text())
    vocabulary = described["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    place.write_text(json.dumps(described))
    with pytest.raises(ModelError, match="not the store's"):
        evaluate.run(_config(world, models={"kd": str(tmp_path / "kd")}, baseline=None))

    with pytest.raises(DataError, match="sparsekd evaluate"):
        load_evaluation(tmp_path)
