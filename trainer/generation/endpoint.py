"""Answers from an OpenAI-compatible endpoint: many requests at a time, each asked again after a failure.

What an endpoint sends is read as anybody's: bounded in size, and every value of the type that it must have.
Redirects are not followed, since they would take the key elsewhere.
"""

import asyncio
import json
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from sparsekd.logit_store.errors import first_line
from sparsekd.trainer.config.generate import GenerateConfig
from sparsekd.trainer.generation.answers import FAILED, Reply, Task, is_unicode, message_of
from sparsekd.trainer.run.errors import Stopped, UserError
from sparsekd.trainer.run.stop import StopWatch

LARGEST_REPLY = 16 << 20
"""Bytes of a reply: a million tokens are some 5 MB."""

_FIRST_WAIT, _LONGEST_WAIT = 0.5, 60.0
_LONGEST_ASKED_WAIT = 600.0
"""Seconds that `Retry-After` may ask for."""

_SECONDS_BETWEEN_LOOKS = 0.1
_SECONDS_TO_FINISH = 10.0
"""For the requests that are under way when the command is asked to stop; Slurm and others kill after 30."""

_NOT_OF_THIS_PROMPT = {
    401: "the key is not accepted; export the right one in the variable that generate.key_variable names",
    403: "the key is not accepted; export the right one in the variable that generate.key_variable names",
    404: "there is no such address or model; check generate.endpoint and generate.model",
    405: "this address does not take such requests; check generate.endpoint",
}
_REFUSED_PROMPT = (400, 413, 422)
"""Asked again, these would be refused again."""


class _FailedError(Exception):
    """A request without an answer.

    Args:
        reason: Why.
        again: Whether it may be asked again.
        wait: Seconds for which the endpoint asks.
    """

    def __init__(self, reason: str, *, again: bool = True, wait: float | None = None) -> None:
        super().__init__(reason)
        self.again, self.wait = again, wait


@dataclass
class Counts:
    """What happened.

    Attributes:
        answered: Answers that came.
        repeated: Requests that were asked again.
        failed: Answers that did not come, with the reason.
    """

    answered: int = 0
    repeated: int = 0
    failed: int = 0
    first_failure: str = ""


class Endpoint:
    """Asks an endpoint for answers.

    Args:
        config: Where it is, and how it is asked.
        key: Its key; None where it wants none.
        watch: What asks this process to stop.
    """

    def __init__(self, config: GenerateConfig, key: str | None, watch: StopWatch) -> None:
        assert config.endpoint is not None
        self._config, self._key, self._watch = config, key, watch
        self._address = config.endpoint.rstrip("/") + "/chat/completions"
        self._not_before = 0.0  # for all requests: the endpoint has asked for it
        self._fruitless: list[tuple[Task, Reply]] = []  # since the last answer
        self._ends = False
        self.counts = Counts()

    def ask(self, tasks: Iterable[Task], keep: Callable[[Task, Reply], None]) -> None:
        """Asks for all answers, and has each kept as it comes, in any order.

        Args:
            tasks: What is asked for.
            keep: Is given each answer, and with generate.failed=skip each that did not come.

        Raises:
            UserError: The endpoint cannot be used, gave none of many answers in a row, or an answer cannot
                be kept.
            Stopped: The command was asked to stop.
        """
        asyncio.run(self._ask_all(iter(tasks), keep))

    async def _ask_all(self, tasks: Any, keep: Callable[[Task, Reply], None]) -> None:
        config = self._config
        headers = {"Accept-Encoding": "identity"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        async with httpx.AsyncClient(
            headers=headers,
            timeout=config.timeout_seconds,
            limits=httpx.Limits(max_connections=config.concurrency),
            follow_redirects=False,
        ) as client:
            askers = [
                asyncio.create_task(self._ask_in_turn(client, tasks, keep)) for _ in range(config.concurrency)
            ]
            try:
                await self._until_done(askers)
            finally:
                for asker in askers:
                    asker.cancel()
                await asyncio.gather(*askers, return_exceptions=True)
        if config.failed == "skip":
            self._keep_failures(keep)
        if self._watch.request is not None:
            raise Stopped(f"asked to stop ({self._watch.request}); {self.counts.answered:,} answers came")

    async def _until_done(self, askers: list["asyncio.Task[None]"]) -> None:
        """Waits for all, but for what still runs some time after the command was asked to stop."""
        pending, deadline = set(askers), None
        while pending:
            done, pending = await asyncio.wait(
                pending, timeout=_SECONDS_BETWEEN_LOOKS, return_when=asyncio.FIRST_EXCEPTION
            )
            for asker in done:
                asker.result()
            if self._watch.request is not None:
                self._ends = True
                deadline = deadline or time.monotonic() + _SECONDS_TO_FINISH
                if time.monotonic() > deadline:
                    return

    async def _ask_in_turn(
        self, client: httpx.AsyncClient, tasks: Any, keep: Callable[[Task, Reply], None]
    ) -> None:
        for task in tasks:
            try:
                reply = await self._ask_again(client, task)
            except _FailedError as error:
                if self._ends:
                    return
                self._note_failure(task, str(error))
                continue
            self.counts.answered += 1
            keep(task, reply)
            if self._config.failed == "skip":
                self._keep_failures(keep)
            self._fruitless.clear()
            if self._ends:
                return

    def _note_failure(self, task: Task, reason: str) -> None:
        """Counts an answer that did not come; many in a row are the endpoint's fault.

        Raises:
            UserError: They are.
        """
        self.counts.failed += 1
        self.counts.first_failure = self.counts.first_failure or f"{task.prompt.place}: {reason}"
        reply = Reply(None, FAILED, str(self._config.model), reason=reason)
        self._fruitless.append((task, reply))
        if len(self._fruitless) >= max(8, self._config.concurrency):
            raise UserError(
                f"{self._address} gave none of the last {len(self._fruitless):,} answers that it was asked "
                f"for ({reason}); mend it or the settings, then run the same command again: what came is "
                "kept."
            )

    def _keep_failures(self, keep: Callable[[Task, Reply], None]) -> None:
        for task, reply in self._fruitless:
            keep(task, reply)
        self._fruitless.clear()

    async def _ask_again(self, client: httpx.AsyncClient, task: Task) -> Reply:
        """One answer, asked for as often as `generate.retries` says."""
        for attempt in range(self._config.retries + 1):
            await self._pause(self._not_before - time.monotonic())
            try:
                return await self._ask_once(client, task)
            except _FailedError as error:
                if not error.again or attempt == self._config.retries or self._ends:
                    raise
                self.counts.repeated += 1
                if error.wait is not None:
                    self._not_before = max(self._not_before, time.monotonic() + error.wait)
                    if attempt == 0:  # its word is enough once
                        continue
            # Not the seed's business: waits of several askers are to differ.
            await self._pause(min(_LONGEST_WAIT, _FIRST_WAIT * 2**attempt) * random.uniform(0.5, 1))
        raise AssertionError("unreachable")

    async def _pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if self._ends:
                raise _FailedError("the command was asked to stop", again=False)
            await asyncio.sleep(min(left, _SECONDS_BETWEEN_LOOKS))

    async def _ask_once(self, client: httpx.AsyncClient, task: Task) -> Reply:
        try:
            async with asyncio.timeout(self._config.timeout_seconds):
                async with client.stream("POST", self._address, json=self._body(task)) as response:
                    data = await _bounded(response)
        except TimeoutError as error:
            raise _FailedError(f"no answer in {self._config.timeout_seconds:g} s") from error
        except (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL) as error:
            raise _FailedError(f"{type(error).__name__}: {self._said(first_line(error))}") from error
        status = response.status_code
        if status == 200:
            return reply_of(data, str(self._config.model))
        reason = f"HTTP {status}: {self._said(data[:300].decode('utf-8', 'replace'))}"
        if response.is_redirect:
            where = self._said(response.headers.get("location", "nowhere"))
            raise UserError(
                f"{self._address} redirects to {where}, and redirects are not followed; give the address "
                "itself as generate.endpoint, if you trust it."
            )
        if status in _NOT_OF_THIS_PROMPT:
            raise UserError(f"{self._address} says {reason}: {_NOT_OF_THIS_PROMPT[status]}.")
        raise _FailedError(
            reason, again=status not in _REFUSED_PROMPT, wait=_asked_wait(response.headers.get("retry-after"))
        )

    def _body(self, task: Task) -> dict[str, Any]:
        config = self._config
        body: dict[str, Any] = {
            "model": config.model,
            "messages": task.prompt.messages,
            "seed": task.seed,
            "temperature": config.temperature,
            "top_p": config.top_p,
            "max_tokens": config.max_tokens,
        }
        body = {name: value for name, value in (body | config.request).items() if value is not None}
        return body if task.prompt.tools is None else body | {"tools": task.prompt.tools}

    def _said(self, text: str) -> str:
        """What an endpoint says, in a line, without the key where it shows it."""
        if self._key is not None:
            text = text.replace(self._key, "***")
        return " ".join(text.split())[:200]


async def _bounded(response: httpx.Response) -> bytes:
    """The body as it was sent, if it is not too long.

    Raises:
        _FailedError: It is, or it is compressed, which nobody asked for.
    """
    encoding = response.headers.get("content-encoding", "identity")
    if encoding not in ("", "identity"):
        raise _FailedError(f"a reply in the encoding {encoding[:40]!r}, which was not asked for")
    data = bytearray()
    async for chunk in response.aiter_raw():
        data += chunk
        if len(data) > LARGEST_REPLY:
            raise _FailedError(f"a reply of more than {LARGEST_REPLY:,} bytes")
    return bytes(data)


def _asked_wait(value: str | None) -> float | None:
    """Seconds that a `Retry-After` asks for, as a number or a date; None where it says nothing."""
    if value is None:
        return None
    try:
        seconds = (
            float(value)
            if len(value) < 20
            else (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
        )
    except (ValueError, TypeError):
        return None
    return min(max(seconds, 0.0), _LONGEST_ASKED_WAIT) if seconds == seconds else None


def reply_of(data: bytes, model: str) -> Reply:
    """The answer in the body of a reply.

    Args:
        data: The body.
        model: What to call the model where the reply does not say.

    Raises:
        _FailedError: It is no answer.
    """
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _FailedError(f"a reply that is no JSON ({first_line(error)})") from error
    choices = _field(body, "choices", list)
    if not choices:
        raise _FailedError("a reply without choices")
    message = _field(choices[0], "message", dict)
    content = message.get("content")
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        content = "".join(part["text"] for part in content if isinstance(part.get("text"), str))
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    finish = choices[0].get("finish_reason")
    for name, value in (("content", content), ("reasoning", reasoning), ("finish_reason", finish)):
        if value is not None and not isinstance(value, str):
            raise _FailedError(f"a reply whose {name} is of type {type(value).__name__}, expected text")
    made = message_of(content or "", reasoning, _calls(message.get("tool_calls")))
    if not is_unicode([made, finish]):
        raise _FailedError("a reply with half of a surrogate pair, which is no Unicode text")
    usage = body.get("usage")
    tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
    named = body.get("model")
    return Reply(
        made,
        finish,
        named[:200] if isinstance(named, str) and named and is_unicode(named) else model,
        tokens if type(tokens) is int and 0 <= tokens < 2**31 else None,
    )


def _field(value: Any, name: str, kind: type) -> Any:
    found = value.get(name) if isinstance(value, dict) else None
    if not isinstance(found, kind):
        raise _FailedError(
            f"a reply whose {name} is of type {type(found).__name__}, expected {kind.__name__}"
        )
    return found


def _calls(value: Any) -> list[dict[str, Any]] | None:
    """Calls of tools, with nothing but what a chat template reads."""
    if not value:
        return None
    calls = []
    for call in value if isinstance(value, list) else [None]:
        call = call if isinstance(call, dict) else {}
        function = call.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        arguments = function.get("arguments") if isinstance(function, dict) else None
        if not isinstance(name, str) or not isinstance(arguments, str | dict):
            raise _FailedError("a reply with a call of a tool that has no name or arguments")
        made = {"type": "function", "function": {"name": name, "arguments": arguments}}
        calls.append({"id": call["id"], **made} if isinstance(call.get("id"), str) else made)
    return calls
