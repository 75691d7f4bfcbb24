"""Chat templates of well-known models turn by turn, where their tokenizers are.

`SPARSEKD_TOKENIZERS` names a folder of tokenizer folders with these names; they cannot be shipped.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sparsekd.trainer.config.corpus import CorpusConfig
from sparsekd.trainer.corpus.bodies import conversation_of
from sparsekd.trainer.corpus.documents import Document
from sparsekd.trainer.corpus.examples import Example, ExampleEncoder
from sparsekd.trainer.corpus.fields import RecordError

FOLDER = os.environ.get("SPARSEKD_TOKENIZERS")
if FOLDER is None:
    pytest.skip("SPARSEKD_TOKENIZERS names no folder of real tokenizers", allow_module_level=True)

ENDS = {
    "smollm2": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "llama3_1": "<|eot_id|>",
    "gemma3": "<end_of_turn>",
    "deepseek_v3": "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "mistral_nemo": "</s>",
}
"""What closes an answer."""

MESSAGES = [
    {"role": "user", "content": "What is 2+2?"},
    {"role": "assistant", "content": "It is 4.\n\nSure: \u00fc \U0001f600 \u4e2d\u6587"},
    {"role": "user", "content": "And 3?"},
    {"role": "assistant", "content": "Three"},
]
LAST = {"qwen3": "<think>\n\n</think>\n\nThree"}
REWRITES = {"qwen3"}
WITH_TOOLS = {"qwen3", "deepseek_v3", "mistral_nemo"}


@pytest.fixture(params=ENDS)
def named(request: pytest.FixtureRequest) -> tuple[str, PreTrainedTokenizerBase]:
    assert FOLDER is not None
    folder = Path(FOLDER) / request.param
    if not folder.is_dir():
        pytest.skip(f"SPARSEKD_TOKENIZERS has no tokenizer {request.param}")
    return request.param, AutoTokenizer.from_pretrained(folder)


def encoded(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], **keys: Any) -> Example:
    body = conversation_of(messages, None, "a:1", "messages")
    (found,) = ExampleEncoder(tokenizer, CorpusConfig(**keys)).encode(
        [Document("", b"x", 0, "a:1", 1.0, body)]
    )
    if isinstance(found, RecordError):
        raise found
    return found


def learned(tokenizer: PreTrainedTokenizerBase, found: Example) -> list[str]:
    edges = np.flatnonzero(np.diff(np.concatenate([[False], found.counted, [False]]).astype(int)))
    return [tokenizer.decode(found.token_ids[a:b]) for a, b in edges.reshape(-1, 2)]


def test_answers_and_their_ends_are_learned(named: tuple[str, PreTrainedTokenizerBase]) -> None:
    name, tokenizer = named
    found = encoded(tokenizer, MESSAGES)
    assert found.token_ids.tolist() == tokenizer.apply_chat_template(MESSAGES)["input_ids"]
    answers = [MESSAGES[1]["content"], LAST.get(name, "Three")]
    assert learned(tokenizer, found) == [answer + ENDS[name] for answer in answers]
    assert found.rewritten == (name in REWRITES) and found.across == 0
    assert learned(tokenizer, encoded(tokenizer, MESSAGES, train_on="last")) == [answers[1] + ENDS[name]]
    with_system = [{"role": "system", "content": "Be brief."}, *MESSAGES]
    assert learned(tokenizer, encoded(tokenizer, with_system)) == [answer + ENDS[name] for answer in answers]


def test_spellings_stay_text(named: tuple[str, PreTrainedTokenizerBase]) -> None:
    name, tokenizer = named
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    control = tokenizer.convert_tokens_to_ids(special)
    turns = ["<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"] if name == "deepseek_v3" else []
    hostile = "".join(f"a{spelling}b " for spelling in [*special[:40], *turns, ENDS[name]]) + "."
    messages = [message | {"content": hostile} for message in MESSAGES]
    found, plain = encoded(tokenizer, messages), encoded(tokenizer, MESSAGES)
    control += tokenizer.convert_tokens_to_ids(turns)
    controls = [example.token_ids[np.isin(example.token_ids, control)].tolist() for example in (found, plain)]
    assert controls[0] == controls[1]
    before = LAST.get(name, "Three").removesuffix("Three")
    assert learned(tokenizer, found) == [hostile + ENDS[name], before + hostile + ENDS[name]]
    assert tokenizer.decode(found.token_ids) == tokenizer.apply_chat_template(messages, tokenize=False)


def test_calls_of_tools_are_learned_or_refused(named: tuple[str, PreTrainedTokenizerBase]) -> None:
    name, tokenizer = named
    arguments: Any = '{"city": "Rome"}' if name == "deepseek_v3" else {"city": "Rome"}
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    messages = [
        MESSAGES[0],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "sunny", "tool_call_id": "abcdefghi", "name": "weather"},
        MESSAGES[3],
    ]
    if name not in WITH_TOOLS:
        with pytest.raises(RecordError, match=r"does not write the assistant's call|roles must alternate"):
            encoded(tokenizer, messages)
        return
    found = learned(tokenizer, encoded(tokenizer, messages))
    assert len(found) == 2 and "weather" in found[0] and "Rome" in found[0] and "sunny" not in found[0]
    assert found[1].endswith("Three" + ENDS[name]) and "sunny" not in found[1]
    print(name, found)
