"""Conversations, pairs and given ids into tokens, with what of them is learned.

A conversation gives the ids of `tokenizer.apply_chat_template`, but that the names of control tokens in what
people wrote stay text. A pair is its prompt and its completion as one text, begun as the tokenizer begins one
and closed by the end token, which is learned with the completion.

Shapes: N tokens of an example.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from sparsekd.trainer.config.corpus import CorpusConfig
from sparsekd.trainer.corpus.bodies import Conversation, Pair, TokenIds
from sparsekd.trainer.corpus.chat_template import ChatTemplate, Rendered, Span
from sparsekd.trainer.corpus.documents import Document
from sparsekd.trainer.corpus.fields import RecordError
from sparsekd.trainer.corpus.offsets import OffsetTokenizer, Placed, within
from sparsekd.trainer.corpus.tokenizer import end_token_id, special_frame
from sparsekd.trainer.run.errors import DataError

LARGEST_CHARACTERS = 1 << 24
"""Of one conversation or pair: it is encoded in one piece, some hundred bytes a token."""


class Example(NamedTuple):
    """Tokens of a document that is no plain text.

    Attributes:
        token_ids: int32 [N].
        counted: bool [N], which tokens are learned.
        across: How many lie across the beginning or end of what is learned, and are not.
        rewritten: Whether its chat template writes turns otherwise once others follow them.
        unwritten: Whether its chat template leaves a message's text away, or changes it.
        factors: float32 [N], of the document's weight at each token; None for 1 everywhere.
    """

    token_ids: NDArray[np.int32]
    counted: NDArray[np.bool_]
    across: int = 0
    rewritten: bool = False
    unwritten: bool = False
    factors: NDArray[np.float32] | None = None


def rationales(rendered: Rendered, opening: str, closing: str) -> list[Span]:
    """What stands between two marks in the parts that are learned; one that is not closed ends with its part.

    A part may begin within a rationale, where the template writes the first mark for the assistant.
    """
    text, found = rendered.text, []
    for start, stop in rendered.spans:
        place = start
        first, end = text.find(opening, start, stop), text.find(closing, start, stop)
        if end != -1 and (first == -1 or end < first) and text[:start].rstrip().endswith(opening):
            found.append((start, end))
            place = end
        while (first := text.find(opening, place, stop)) != -1:
            begin = first + len(opening)
            end = text.find(closing, begin, stop)
            place = stop if end == -1 else end
            found.append((begin, place))
    return found


class ExampleEncoder:
    """Makes examples of documents with a body.

    Args:
        tokenizer: The store's tokenizer.
        config: What is learned, and what spellings of special tokens become.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: CorpusConfig) -> None:
        self._tokenizer = tokenizer
        self._config = config
        self._entries = max(tokenizer.get_vocab().values()) + 1
        self._places: OffsetTokenizer | None = None
        self._template: ChatTemplate | None = None
        self._around: tuple[NDArray[np.int32], NDArray[np.int32], int] | None = None

    def encode(self, documents: Sequence[Document]) -> list[Example | RecordError]:
        """The example of each document, or why there is none.

        Raises:
            DataError: The tokenizer cannot encode documents of this kind at all.
        """
        found: list[Example | RecordError] = []
        texts: list[tuple[int, Document, Rendered]] = []
        for number, document in enumerate(documents):
            try:
                match document.body:
                    case TokenIds():
                        found.append(self._given(document.body, document.place))
                        continue
                    case Conversation():
                        rendered = self._chat(document.body).render(document.body, document.place)
                    case Pair():
                        rendered = self._pair(document.body)
                    case _:
                        raise TypeError("a document of plain text is none for ExampleEncoder")
                if len(rendered.text) > LARGEST_CHARACTERS:
                    raise RecordError(
                        "too long",
                        f"{document.place} has {len(rendered.text):,} characters, expected "
                        f"{LARGEST_CHARACTERS:,} at most in one record; break it up.",
                    )
            except RecordError as error:
                found.append(error)
                continue
            texts.append((number, document, rendered))
            found.append(Example(np.empty(0, np.int32), np.empty(0, np.bool_)))
        for (number, document, rendered), placed in zip(texts, self._placed(texts), strict=True):
            if isinstance(placed, RecordError):
                found[number] = placed
            else:
                found[number] = self._example(document, rendered, placed)
        return found

    def _chat(self, conversation: Conversation) -> ChatTemplate:
        if self._template is None:
            self._template = ChatTemplate(self._tokenizer, self._config)
        return self._template

    def _pair(self, pair: Pair) -> Rendered:
        text = pair.prompt + pair.completion
        start = 0 if self._config.train_on == "all" else len(pair.prompt)
        return Rendered(text, [(start, len(text))])

    def _placed(self, texts: Sequence[tuple[int, Document, Rendered]]) -> list[Placed | RecordError]:
        if not texts:
            return []
        if self._places is None:
            self._places = OffsetTokenizer(self._tokenizer)
        found: dict[int, Placed | RecordError] = {}
        for is_pair in (False, True):
            plain = [
                (number, rendered.text)
                for number, document, rendered in texts
                if rendered.controls is None and isinstance(document.body, Pair) == is_pair
            ]
            # Of a conversation without spellings, each special token is the template's.
            encoded = self._places.encode(
                [text for _, text in plain],
                split_special_tokens=is_pair and self._config.split_special_tokens,
            )
            found |= {number: placed for (number, _), placed in zip(plain, encoded, strict=True)}
        for number, document, rendered in texts:
            if rendered.controls is not None:
                assert self._template is not None
                try:
                    found[number] = self._places.encode_with_controls(
                        rendered.text, rendered.controls, self._template.control_spellings
                    )
                except DataError as error:
                    found[number] = RecordError(
                        "spellings that the tokenizer cannot keep text",
                        f"{document.place}: {error}; mend the record, or set "
                        "corpus.split_special_tokens=false to make them control tokens.",
                    )
        return [found[number] for number, _, _ in texts]

    def _example(self, document: Document, rendered: Rendered, placed: Placed) -> Example:
        counted, across = within(placed, rendered.spans)
        factors = self._factors(rendered, placed)
        if not isinstance(document.body, Pair):
            return Example(placed.token_ids, counted, across, rendered.rewritten, rendered.unwritten, factors)
        before, behind, end = self._around_pairs()
        ids = placed.token_ids
        # Where spellings are control tokens, a text may bring its own first and last one.
        if len(before) and len(ids) and before[-1] == ids[0] == self._tokenizer.bos_token_id:
            before = before[:-1]
        last = behind[-1] if len(behind) else ids[-1] if len(ids) else None
        closing = behind if last == end else np.append(behind, np.int32(end))
        learned = np.zeros(len(before), np.bool_), counted, closing == end
        if factors is not None:
            ends = [np.ones(len(part), np.float32) for part in (before, closing)]
            factors = np.concatenate([ends[0], factors, ends[1]])
        return Example(
            np.concatenate([before, ids, closing]), np.concatenate(learned), across, factors=factors
        )

    def _factors(self, rendered: Rendered, placed: Placed) -> NDArray[np.float32] | None:
        """What tokens of a rationale weigh beside the others; None where none weighs another."""
        weight = self._config.rationale_weight
        spans = rationales(rendered, *self._config.rationale_marks) if weight != 1 else []
        if not spans:
            return None
        return np.where(within(placed, spans)[0], np.float32(weight), np.float32(1))

    def _around_pairs(self) -> tuple[NDArray[np.int32], NDArray[np.int32], int]:
        """What the tokenizer puts before and behind a text, and the token that closes it."""
        if self._around is None:
            frame = special_frame(self._tokenizer)
            if frame is None:
                raise DataError(
                    "It cannot be seen which tokens this tokenizer puts around a text, so that pairs cannot "
                    "be encoded with it; write them as conversations (corpus.kind=conversation)."
                )
            self._around = *frame, end_token_id(self._tokenizer, self._config.end_token)
        return self._around

    def _given(self, body: TokenIds, place: str) -> Example:
        if len(body.token_ids) and body.token_ids.max() >= self._entries:
            raise RecordError(
                "an id outside of the vocabulary",
                f"{place}: input_ids hold {body.token_ids.max()}, and the tokenizer has {self._entries:,} "
                "ids: these are of another one; give it as corpus.tokenizer.",
            )
        counted = np.ones_like(body.counted) if self._config.train_on == "all" else body.counted
        return Example(body.token_ids, counted)
