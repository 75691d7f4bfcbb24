"""`store verify --teacher` on imported records: each fault by its name, and none where there is none."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from capture_world import VOCABULARY, config_for, make_teacher
from transformers import AutoModelForCausalLM

from sparsekd.logit_store.manifest import CodecSpec, TeacherIdentity
from sparsekd.logit_store.protocol.reader import open_store
from sparsekd.trainer.importers.document import NOT_LISTED, Document, Format, Source
from sparsekd.trainer.importers.store import ImportSettings, import_source
from sparsekd.trainer.run.errors import DataError
from sparsekd.trainer.teacher.verify import run as verify

LENGTH, K = 40, 12
Texts = tuple[list[np.ndarray], list[np.ndarray]]
"""Token ids [T] and log-probabilities [T, V] of each document."""


class World:
    """A teacher, texts that it wrote, and what it says of them."""

    def __init__(self, teacher: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
        generator = torch.Generator().manual_seed(1)
        texts = torch.randint(1, VOCABULARY, (6, 1), generator=generator)
        for _ in range(LENGTH - 1):
            shares = torch.from_numpy(self.said(texts)[:, -1]).exp()
            texts = torch.cat([texts, torch.multinomial(shares, 1, generator=generator)], dim=1)
        self.tokens = list(texts.numpy())
        self.dense = list(self.said(texts))
        front = torch.zeros((len(texts), 1), dtype=torch.int64)  # the model's bos_token_id
        self.doubled = list(self.said(torch.cat([front, texts], dim=1)))

    @torch.inference_mode()
    def said(self, texts: torch.Tensor) -> np.ndarray:
        logits = self.model(texts).logits[..., :VOCABULARY]
        return logits.double().log_softmax(-1).numpy()


@pytest.fixture(scope="module")
def world(llama: Path) -> World:
    return World(llama)


def normalised(values: np.ndarray) -> np.ndarray:
    top = values.max(axis=-1, keepdims=True)
    return values - top - np.log(np.exp(values - top).sum(axis=-1, keepdims=True))


def nucleus(values: np.ndarray, mass: float) -> np.ndarray:
    order = np.argsort(-values, axis=1)
    ranked = np.take_along_axis(values, order, axis=1)
    ranked[np.cumsum(np.exp(ranked), axis=1) - np.exp(ranked) >= mass] = -np.inf
    cut = np.empty_like(values)
    np.put_along_axis(cut, order, ranked, axis=1)
    return normalised(cut)


def penalised(values: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    lower = values.copy()
    for place in range(len(tokens)):
        lower[place, np.unique(tokens[: place + 1])] -= 1.5
    return normalised(lower)


def late(dense: list[np.ndarray]) -> list[np.ndarray]:
    return [np.concatenate([one[:1], one[:-1]]) for one in dense]


OTHER_IDS = np.random.default_rng(0).permutation(VOCABULARY)

FAULTS: dict[str, tuple[Callable[[World], Texts], str]] = {
    "late": (lambda w: (w.tokens, late(w.dense)), "stand one position late"),
    "early": (lambda w: (w.tokens, [np.roll(one, -1, axis=0) for one in w.dense]), "one position early"),
    "temperature": (
        lambda w: (w.tokens, [normalised(one / 1.5) for one in w.dense]),
        "at another temperature, about 1.50",
    ),
    "late, temperature": (
        lambda w: (w.tokens, [normalised(one / 2) for one in late(w.dense)]),
        "stand one position late .*, and are at another temperature, about 2.00",
    ),
    "top-p": (lambda w: (w.tokens, [nucleus(one, 0.9) for one in w.dense]), r"renormalised on a subset"),
    "penalty": (
        lambda w: (w.tokens, [penalised(one, text) for one, text in zip(w.dense, w.tokens, strict=True)]),
        "have ids that the text has had lower than the others, by 1.5 nats: a penalty",
    ),
    "ids": (
        lambda w: (w.tokens, [one[:, OTHER_IDS] for one in w.dense]),
        "have the teacher's values under other ids",
    ),
    "ids of the text, too": (
        lambda w: (
            [np.argsort(OTHER_IDS)[text] for text in w.tokens],
            [one[:, OTHER_IDS] for one in w.dense],
        ),
        "less probable to this teacher: the ids of the text are another tokenizer's",
    ),
    "one more token": (
        lambda w: (w.tokens, [one[1:] for one in w.doubled]),
        "made with one more token in front of each document",
    ),
    "one more token, late": (
        lambda w: (w.tokens, [one[:-1] for one in w.doubled]),
        "one position late from the start of each document, which had one more token in front",
    ),
}


def imported(
    world: World,
    tokens: Path,
    texts: Texts,
    place: Path,
    rest: str = "derived",
    codec: str = "exact",
    length: int | None = None,
) -> Path:
    """Imports the K most likely ids of each position, into rows of some length."""
    (place / "source").write_text("")

    def documents() -> Iterator[Document]:
        for number, (text, said) in enumerate(zip(*texts, strict=True)):
            ids = np.argsort(-said, axis=1)[:, :K]
            values = np.take_along_axis(said, ids, axis=1)
            mask = np.append(np.ones(len(text) - 1, np.bool_), False)
            listed = np.where(np.isfinite(values), ids, NOT_LISTED)
            yield Document(f"document {number}", text.astype(np.int64), mask, listed, values)

    source = Source((place / "source",), rest, documents)
    layout = Format("test", "made here", (), (), lambda path, options: source, ())
    store = open_store(tokens)
    settings = ImportSettings(
        tokenizer=store.manifest.tokenizer,
        tokenizer_files=store.tokenizer_path,
        teacher=TeacherIdentity("big", None, "unknown", "unknown", "unknown", "imported", {}),
        codec=CodecSpec(codec, {}),
        sequence_length=length,
        k=3 if any(np.isneginf(said).any() for said in texts[1]) else K,
        mask_short=True,
        rows_per_shard=4,
    )
    import_source(layout, source, place / "store", settings)
    return place / "store"


@pytest.mark.parametrize("codec", ["exact", "tkq8"])
@pytest.mark.parametrize("rest", ["derived", "unknown"])
def test_a_clean_import_is_found_clean(
    world: World,
    tokens: Path,
    llama: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    rest: str,
    codec: str,
) -> None:
    store = imported(world, tokens, (world.tokens, world.dense), tmp_path, rest, codec)
    verify(config_for(tokens, llama, store), store)
    printed = capsys.readouterr().out
    assert "are 0.0" in printed or "e-0" in printed
    assert f"next: sparsekd train store.path={store}" in printed


@pytest.mark.parametrize("name", [None, "late", "one more token"])
def test_rows_may_be_padding_for_the_most_part(
    tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str | None
) -> None:
    """What stands behind the last document passes no teacher."""
    teacher = make_teacher(
        tmp_path / "long", "llama", tokenizer=tokens / "tokenizer", max_position_embeddings=300
    )
    world = World(teacher)
    texts = (world.tokens, world.dense) if name is None else FAULTS[name][0](world)
    store = imported(world, tokens, texts, tmp_path, length=300)
    config = config_for(tokens, teacher, store)
    if name is None:
        verify(config, store)
        assert f"next: sparsekd train store.path={store}" in capsys.readouterr().out
    else:
        with pytest.raises(DataError, match=FAULTS[name][1]):
            verify(config, store)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named(world: World, tokens: Path, llama: Path, tmp_path: Path, name: str) -> None:
    corrupt, expected = FAULTS[name]
    store = imported(world, tokens, corrupt(world), tmp_path)
    with pytest.raises(DataError, match=expected) as refused:
        verify(config_for(tokens, llama, store), store)
    assert "\n" not in str(refused.value)


def test_another_teacher_has_no_other_name(world: World, tokens: Path, llama: Path, tmp_path: Path) -> None:
    other = make_teacher(tmp_path / "other", "llama", seed=5, tokenizer=tokens / "tokenizer")
    said = torch.from_numpy(np.stack(world.tokens))
    texts = world.tokens, list(World(other).said(said))
    store = imported(world, tokens, texts, tmp_path)
    with pytest.raises(DataError, match="fit neither this teacher nor a fault"):
        verify(config_for(tokens, llama, store), store)
