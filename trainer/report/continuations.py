"""Held-out prompts, continued greedily by every model: what the figures feel like."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from sparsekd.logit_store.protocol.reader import LogitStore
from sparsekd.logit_store.row import PADDING_DOCUMENT, segment_lengths
from sparsekd.trainer.data.heldout import SPLIT
from sparsekd.trainer.models.causal_lm import ModelSource
from sparsekd.trainer.models.opened import open_model

_PROMPT_TOKENS = 48


@dataclass(frozen=True)
class Continuation:
    """A prompt, what really follows, and what each model says."""

    document: int
    prompt: str
    truth: str
    by_model: dict[str, str]


def continuations(
    store: LogitStore,
    sources: Mapping[str, ModelSource],
    *,
    prompts: int,
    new_tokens: int,
    rows: int,
    dtype: str,
    device: torch.device,
) -> list[Continuation]:
    """Lets each model, loaded one after another, continue the same prompts.

    Args:
        store: Where prompts are from.
        sources: Model -> where it is loaded from.
        prompts: How many, at most.
        new_tokens: Length of a continuation, at most.
        rows: Held-out rows to choose prompts from, evenly spread.
        dtype: In which the models run.
        device: On which the models run.
    """
    chosen = _choose(store, prompts=prompts, new_tokens=new_tokens, rows=rows)
    if not chosen:
        print(
            f"no held-out document has {_PROMPT_TOKENS + new_tokens} tokens in a row: nothing is continued",
            flush=True,
        )
        return []
    tokenizer = AutoTokenizer.from_pretrained(store.tokenizer_path)
    end, vocabulary = store.manifest.tokenizer.eos_token_id, store.manifest.tokenizer.vocabulary_size
    texts: dict[str, list[str]] = {}
    for name, source in sources.items():
        print(f"{name} continues {len(chosen)} prompts", flush=True)
        key = "teacher" if name == "teacher" else "student"
        model: Any = open_model(source, key, store, dtype=dtype, device=device).model
        texts[name] = []
        for _, token_ids in chosen:
            prompt = torch.from_numpy(token_ids[:_PROMPT_TOKENS].astype(np.int64)).to(device)[None]
            with torch.inference_mode():
                made = model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    do_sample=False,
                    max_new_tokens=new_tokens,
                    eos_token_id=end,
                    pad_token_id=0 if end is None else end,
                    # Rows of the head beyond the true vocabulary are padding, and were never trained.
                    suppress_tokens=list(range(vocabulary, model.get_output_embeddings().weight.shape[0]))
                    or None,
                )
            texts[name].append(str(tokenizer.decode(made[0, prompt.shape[1] :].tolist())))
        del model
    return [
        Continuation(
            document=document,
            prompt=str(tokenizer.decode(token_ids[:_PROMPT_TOKENS].tolist())),
            truth=str(tokenizer.decode(token_ids[_PROMPT_TOKENS:].tolist())),
            by_model={name: lines[index] for name, lines in texts.items()},
        )
        for index, (document, token_ids) in enumerate(chosen)
    ]


def _choose(store: LogitStore, *, prompts: int, new_tokens: int, rows: int) -> list[tuple[int, np.ndarray]]:
    """Documents and their first tokens (prompt and truth), from rows spread evenly; long enough ones only."""
    found: list[tuple[int, np.ndarray]] = []
    wanted = _PROMPT_TOKENS + new_tokens
    seen: set[int] = set()
    for number in range(prompts):
        for index in range(number * rows // prompts, (number + 1) * rows // prompts):
            row = store.read_row(SPLIT, index)
            fitting = [
                (int(document), row.token_ids[start : start + wanted])
                for document, start, length in zip(
                    row.segment_documents, row.segment_starts, segment_lengths(row), strict=True
                )
                if document != PADDING_DOCUMENT and length >= wanted and int(document) not in seen
            ]
            if fitting:
                found.append(fitting[0])
                seen.add(fitting[0][0])
                break
    return found
