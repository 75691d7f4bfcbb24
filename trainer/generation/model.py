"""Answers of a teacher in this process: transformers' `generate`, in batches, with a seed for each answer.

The batches follow from the prompts and the settings alone. Each answer draws from a generator of its own, so
that its neighbours in a batch and the number of kills change nothing.

Shapes: B answers of a batch, V rows of the head.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby, islice
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from sparsekd.logit_store.errors import first_line
from sparsekd.trainer.config.schema import Config
from sparsekd.trainer.corpus.bodies import Conversation, text_of
from sparsekd.trainer.generation.answers import FAILED, LENGTH, STOP, Reply, Task, message_of
from sparsekd.trainer.models.causal_lm import DTYPES, load_causal_lm
from sparsekd.trainer.models.source import teacher_source
from sparsekd.trainer.run.errors import ModelError, Stopped, UserError
from sparsekd.trainer.run.stop import StopWatch

Keep = Callable[[Task, Reply], None]


class Writer:
    """A teacher that answers.

    Args:
        config: With the teacher, and how its answers are sampled.
        device: Where it goes.
        watch: What asks this process to stop.

    Raises:
        ModelError: It cannot be loaded, or has no chat template.
    """

    def __init__(self, config: Config, device: torch.device, watch: StopWatch) -> None:
        assert config.teacher.path is not None
        source = teacher_source(config.teacher, config.teacher.path)
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(source.path, **source.files)
        except (OSError, ValueError, ImportError) as error:
            raise ModelError(f"{source.named} brings no tokenizer ({first_line(error)}).") from error
        if self._tokenizer.chat_template is None:
            raise ModelError(
                f"{source.named} has no chat template, so that it cannot be asked; use an instruct model."
            )
        model: Any = load_causal_lm(source, "teacher", dtype=DTYPES[config.teacher.dtype], device=device)
        self._model = model.eval().requires_grad_(False)
        self._settings, self._values = config.generate, config.corpus.chat_template_kwargs
        self._name, self._device, self._watch = config.teacher.path, device, watch
        added = self._tokenizer.added_tokens_decoder.values()
        self._controls = [token.content for token in added if token.special and token.content]
        self._ends = _ends_of(model, self._tokenizer)
        self._longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.failed, self.first_failure = 0, ""

    def ask(self, tasks: Iterable[Task], is_written: Callable[[Task], bool], keep: Keep) -> None:
        """Answers all tasks of which the answer is not written, batch by batch.

        Args:
            tasks: All of a part after another, also those that are written: they belong to their batches.
            is_written: Whether an answer is there.
            keep: Is given each answer that was not.

        Raises:
            UserError: The chat template refuses a prompt, or it is too long (with generate.failed=refuse).
            Stopped: The command was asked to stop; the batch that was begun is not kept.
        """
        for _, part in groupby(tasks, key=lambda task: task.part):
            encoded = [(task, self._encoded(task)) for task in part]
            for task, ids in encoded:
                if isinstance(ids, str):
                    self._fail(task, ids, is_written, keep)
            usable = [(task, ids) for task, ids in encoded if not isinstance(ids, str)]
            for batch in _batches(usable, self._settings.batch_rows):
                if self._watch.request is not None:
                    raise Stopped(f"asked to stop ({self._watch.request})")
                missing = [task for task, _ in batch if not is_written(task)]
                if not missing:
                    continue
                for task, reply in zip((task for task, _ in batch), self._answered(batch), strict=True):
                    if task in missing:
                        keep(task, reply)

    def _fail(self, task: Task, reason: str, is_written: Callable[[Task], bool], keep: Keep) -> None:
        if self._settings.failed == "refuse":
            raise UserError(
                f"{task.prompt.place}: {reason}; mend or remove the prompt, or set generate.failed=skip to "
                "leave such prompts out."
            )
        self.failed += 1
        self.first_failure = self.first_failure or f"{task.prompt.place}: {reason}"
        if not is_written(task):
            keep(task, Reply(None, FAILED, self._name, reason=reason))

    def _encoded(self, task: Task) -> list[int] | str:
        """The ids of a prompt, or why there are none."""
        text = text_of(Conversation(task.prompt.messages, task.prompt.tools))
        spelled = next((name for name in self._controls if name in text), None)
        if spelled is not None:  # it would end the question, where `prepare` takes it for text
            return f"the prompt spells {spelled}, a control token of the teacher"
        try:
            ids = self._tokenizer.apply_chat_template(
                task.prompt.messages,
                tools=task.prompt.tools,
                add_generation_prompt=True,
                return_dict=False,
                **self._values,
            )
        except Exception as error:  # a template may raise anything about what it is given
            return f"the chat template refuses the prompt ({first_line(error)})"
        longest = self._longest
        if longest is not None and len(ids) + self._settings.max_tokens > longest:
            return (
                f"the prompt has {len(ids):,} tokens, which with generate.max_tokens="
                f"{self._settings.max_tokens} are more than the {longest:,} positions of the teacher"
            )
        return list(ids)

    @torch.inference_mode()
    def _answered(self, batch: list[tuple[Task, list[int]]]) -> Iterator[Reply]:
        settings = self._settings
        length = max(len(ids) for _, ids in batch)
        padding = self._ends[0]
        prompt = torch.tensor(
            [[padding] * (length - len(ids)) + ids for _, ids in batch], device=self._device
        )
        mask = torch.tensor(
            [[0] * (length - len(ids)) + [1] * len(ids) for _, ids in batch], device=self._device
        )
        asked = _Asked(self._watch)
        made = self._model.generate(
            prompt,
            attention_mask=mask,
            # Drawn by a processor of ours: the most likely token of what it returns is the draw.
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            num_beams=1,
            max_new_tokens=settings.max_tokens,
            eos_token_id=self._ends,
            pad_token_id=padding,
            logits_processor=self._processors([task.seed for task, _ in batch]),
            stopping_criteria=StoppingCriteriaList([asked]),
        )
        if asked.was_asked:
            raise Stopped(f"asked to stop ({self._watch.request})")
        for ids in made[:, length:].tolist():
            end = next((place for place, token in enumerate(ids) if token in self._ends), None)
            text = self._tokenizer.decode(ids[:end], skip_special_tokens=True)
            finish = LENGTH if end is None else STOP
            yield Reply(message_of(text), finish, self._name, len(ids) if end is None else end + 1)

    def _processors(self, seeds: list[int]) -> LogitsProcessorList:
        settings = self._settings
        made: list[LogitsProcessor] = []
        # Rows of the head beyond the vocabulary are padding, and were never trained.
        vocabulary = max(self._tokenizer.get_vocab().values()) + 1
        rows = self._model.get_output_embeddings().weight.shape[0]
        if rows > vocabulary:
            made.append(
                SuppressTokensLogitsProcessor(list(range(vocabulary, rows)), device=str(self._device))
            )
        if settings.temperature > 0:
            made.append(TemperatureLogitsWarper(settings.temperature))
            if settings.top_p < 1:
                made.append(TopPLogitsWarper(settings.top_p))
            made.append(_Draws(seeds))
        return LogitsProcessorList(made)


class _Draws(LogitsProcessor):
    """Makes the most likely token a draw: scores with Gumbel noise of each row's own generator.

    Args:
        seeds: Of the rows, in order.
    """

    def __init__(self, seeds: list[int]) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # On the CPU, so that a GPU's draws are those of any other device for equal scores. [B, V]
        noise = torch.stack(
            [
                torch.empty(scores.shape[1]).exponential_(generator=generator).log().neg()
                for generator in self._generators
            ]
        )
        return scores.float() + noise.to(scores.device)


class _Asked(StoppingCriteria):
    """Ends a batch when the command is asked to stop."""

    def __init__(self, watch: StopWatch) -> None:
        self._watch = watch
        self.was_asked = False

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.was_asked = self._watch.request is not None
        return torch.full((input_ids.shape[0],), self.was_asked, device=input_ids.device)


def _batches(usable: list[tuple[Task, list[int]]], rows: int) -> Iterator[list[tuple[Task, list[int]]]]:
    """Prompts of like length together, so that little is padding; equal ones stay in order."""
    ordered = iter(sorted(usable, key=lambda pair: -len(pair[1])))
    while batch := list(islice(ordered, rows)):
        yield batch


def _ends_of(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: those of the model's generation settings, and the tokenizer's own."""
    named = model.generation_config.eos_token_id
    ends = [] if named is None else [named] if isinstance(named, int) else list(named)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends.append(tokenizer.eos_token_id)
    if not ends:
        raise ModelError(
            "The teacher has no token that ends an answer; set eos_token_id in its generation_config."
        )
    return ends
