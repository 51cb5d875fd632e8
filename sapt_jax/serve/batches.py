"""Rows that wait for the device, answered together: as many as have come while it was busy with those before them."""

import asyncio
import collections
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sapt_jax.ask.answers import Answer

_log = logging.getLogger(__name__)


class FullError(Exception):
    """More rows wait than may."""


class Batches:
    """One queue, one thread that talks to the device.

    Args:
      answer: rows -> their answers; called in the thread.
      most_rows: of one batch.
      limit: rows that may wait; more are refused.
      batched: told the number of rows of every batch.
    """

    def __init__(self, answer: Callable[[Sequence[Any]], list[Answer]], most_rows: int, limit: int, batched: Callable):
        self._answer, self._most, self._limit, self._batched = answer, most_rows, limit, batched
        self._waiting: collections.deque[tuple[Any, asyncio.Future]] = collections.deque()
        self._thread = ThreadPoolExecutor(1, "device")
        self._some = asyncio.Event()

    @property
    def waiting(self) -> int:
        """Rows that wait now."""
        return sum(not future.done() for _, future in self._waiting)

    def check_room(self, rows: int) -> None:
        """Refuses rows before anything is done for them.

        Raises:
          FullError: so many have no room.
        """
        if self.waiting + rows > self._limit:
            raise FullError

    async def ask(self, rows: Sequence[Any]) -> list[Answer]:
        """Their answers. Whoever is cancelled meanwhile leaves the queue.

        Raises:
          FullError: they have no room.
        """
        self.check_room(len(rows))
        futures = [asyncio.get_running_loop().create_future() for _ in rows]
        self._waiting.extend(zip(rows, futures, strict=True))
        self._some.set()
        try:
            return list(await asyncio.gather(*futures))
        finally:
            for future in futures:
                future.cancel()

    async def in_thread(self, function: Callable[[], Any]) -> Any:
        """What a function returns that must not run beside a batch."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    async def run(self) -> None:
        """Answers until it is cancelled. A batch that fails fails alone."""
        while True:
            await self._some.wait()
            batch = []
            while self._waiting and len(batch) < self._most:
                row, future = self._waiting.popleft()
                if not future.done():
                    batch.append((row, future))
            if not self._waiting:
                self._some.clear()
            if batch:
                await self._answer_batch(batch)

    async def _answer_batch(self, batch: list[tuple[Any, asyncio.Future]]) -> None:
        self._batched(len(batch))
        try:
            answers = await self.in_thread(lambda: self._answer([row for row, _ in batch]))
        except Exception as error:
            _log.exception("a batch of %d rows failed", len(batch))
            for _, future in batch:
                if not future.done():
                    future.set_exception(RuntimeError(f"{type(error).__name__}: {error}"))
            return
        for (_, future), answer in zip(batch, answers, strict=True):
            if not future.done():
                future.set_result(answer)
