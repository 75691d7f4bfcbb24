"""Teachers that do not fit as they are: on the disk in parts, or of fewer bits."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from sparsekd.logit_store.errors import StoreError
from sparsekd.logit_store.protocol.reader import open_store
from sparsekd.logit_store.row import Row, position_ids
from sparsekd.trainer.config.compose import check_for_verb, compose_config
from sparsekd.trainer.door.cli import main
from sparsekd.trainer.run.errors import ConfigError
from sparsekd.trainer.teacher.capture import run as capture
from sparsekd.trainer.teacher.verify import run as verify

sys.path.insert(0, str(Path(__file__).parent))
from capture_world import VOCABULARY, config_for, files_of, make_teacher, make_tokens

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("own_environment")]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokens(tmp_path_factory.mktemp("placed"))


def test_layers_on_the_disk_change_no_byte(
    tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Untied, the head comes last and goes to the disk, too; features are of layers that do."""
    teacher = make_teacher(tmp_path / "teacher", "llama", num_hidden_layers=4)
    features: list[object] = [{"layer": 1, "width": 8}, {"layer": 4}]
    whole = config_for(tokens, teacher, tmp_path / "whole", store__features=features)
    capture(whole)
    divided = config_for(tokens, teacher, tmp_path / "divided", store__features=features)
    divided.teacher.device_map, divided.teacher.max_memory = "auto", {"cpu": "60KB"}
    capsys.readouterr()
    capture(divided)
    assert "on disk" in capsys.readouterr().out
    assert files_of(tmp_path / "divided") == files_of(tmp_path / "whole")
    verify(divided, tmp_path / "divided")


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_records_of_a_quantised_teacher_are_its_own_and_say_so(
    tokens: Path, tmp_path: Path, quantization: str, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = make_teacher(tmp_path / "teacher", "llama", hidden_size=64, intermediate_size=128)
    config = config_for(tokens, teacher, tmp_path / "store", store__codec="exact")
    config.teacher.quantization = quantization
    capture(config)
    store = open_store(tmp_path / "store")
    identity = store.manifest.teacher
    assert identity is not None and f"quantization={quantization}" in identity.engine
    assert "bitsandbytes" in identity.versions
    asked = (
        BitsAndBytesConfig(load_in_8bit=True)
        if quantization == "int8"
        else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    )
    keywords = {"quantization_config": asked, "device_map": {"": "cpu"}, "dtype": torch.float32}
    judges = {
        "quantised": AutoModelForCausalLM.from_pretrained(teacher, **keywords),
        "whole": AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32),
    }
    # Together, as a micro-batch: int8 rounds activations by what else passes with them.
    rows = [store.read_row("train", index) for index in range(config.teacher.micro_batch_rows)]
    recorded = np.concatenate([row.recorded for row in rows if row.recorded is not None])
    stored = np.concatenate([row.teacher.true_logprob for row in rows if row.teacher is not None])
    far = {name: np.abs(said_by(model, rows)[recorded] - stored) for name, model in judges.items()}
    assert far["quantised"].max() < 1e-3 < far["whole"].mean()
    verify(config, tmp_path / "store")  # as the manifest says, whatever the settings of now
    config.teacher.quantization = None
    verify(config, tmp_path / "store")
    # `store verify --repair` finds nothing that is not as at the capture.
    (tmp_path / "store/shards/heldout/000/000000.arrow").unlink()
    capsys.readouterr()
    words = [f"teacher.path={teacher}", f"store.tokens={tokens}", "launch.device=cpu"]
    assert main(["store", "verify", str(tmp_path / "store"), "--repair", *words]) == 0
    assert "not as at the capture" not in capsys.readouterr().out
    # A capture without it is another one.
    with pytest.raises(StoreError, match="is another store than this run would write"):
        capture(config)


def said_by(model: torch.nn.Module, rows: list[Row]) -> np.ndarray:
    """Log-probability of the token behind each position, [B * L]."""
    ids = torch.from_numpy(np.stack([row.token_ids for row in rows]).astype(np.int64))
    places = torch.from_numpy(np.stack([position_ids(row) for row in rows]).astype(np.int64))
    with torch.no_grad():
        logits = model(input_ids=ids, position_ids=places, use_cache=False).logits[..., :VOCABULARY]
    return logits.double().log_softmax(-1).gather(2, ids.roll(-1, 1)[..., None]).flatten().numpy()


def test_a_folder_that_is_quantised_already_is_named(tokens: Path, tmp_path: Path) -> None:
    plain = make_teacher(tmp_path / "plain", "llama", hidden_size=64, intermediate_size=128)
    asked = BitsAndBytesConfig(load_in_4bit=True)
    model = AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=asked, device_map={"": "cpu"}, dtype=torch.float32
    )
    model.save_pretrained(tmp_path / "teacher")
    config = config_for(tokens, tmp_path / "teacher", tmp_path / "store")
    capture(config)
    identity = open_store(tmp_path / "store").manifest.teacher
    assert identity is not None and "quantization=bitsandbytes" in identity.engine
    verify(config, tmp_path / "store")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["teacher.max_memory={cpu: 1GB}"], "takes teacher.device_map=auto"),
        (["teacher.device_map=auto", "teacher.max_memory={gpu: 1GB}"], "a GPU's number or cpu"),
        (["teacher.device_map=auto", "teacher.max_memory={0: lots}"], "a size such as 70GiB"),
        (["teacher.device_map=auto", "teacher.max_memory={0: 70GiB, cpu: 1GB}"], "store.path is not set"),
        (["teacher.device_map=anywhere"], "auto"),
        (["teacher.quantization=fp3"], "int8"),
    ],
)
def test_settings_that_say_nothing_are_refused(
    tokens: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    (tmp_path / "teacher").mkdir()
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        check_for_verb(
            compose_config([*words, f"store.tokens={tokens}", f"teacher.path={tmp_path / 'teacher'}"]),
            "capture",
        )
