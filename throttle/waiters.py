"""Waiting for a permit, and asking for one: the drivers of the queue, blocking and async.

The queue (`throttle.queue`) says what to do; here it is done: the store is asked, the caller rests,
and whatever interrupts it gives its place back. Each pair of functions differs in `await` alone, but
for one thing: a task can be cancelled in the middle of a call to the store, so async calls run in
tasks of their own, which nobody's cancellation cuts off.
"""

from __future__ import annotations

import atexit
from collections.abc import Coroutine, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from throttle.clock import TaskSleeper, ThreadSleeper
from throttle.queue import OVER, Queue, Waiter
from throttle.store import Reply, Store, stores
from throttle.take import Command, Decision, Give, Take, give_back

if TYPE_CHECKING:
    import asyncio

__all__ = ["ask", "ask_async", "give", "give_async", "wait", "wait_async"]

T = TypeVar("T")


def _join(store: Store, waiter: Waiter, decision: Decision | None) -> Queue:
    while True:
        key = waiter.take.key
        queue: Queue = store.queues.get(key.tag) or store.queues.setdefault(
            key.tag, Queue(store, key)
        )
        if queue.join(waiter, waiter.take.max_wait, decision):
            return queue


def _outcome(waiter: Waiter) -> Decision:
    if waiter.error is not None:
        raise waiter.error
    assert waiter.decision is not None
    return waiter.decision


def wait(store: Store, take: Take, decision: Decision | None = None) -> Decision:
    """Stand in line until the take may act, or is refused; return the decision.

    `decision`: the promise it already has. Whatever interrupts the wait gives the place back.
    Raises `StoreUnavailable` when the store does not answer.
    """
    sleeper = ThreadSleeper()
    waiter = Waiter(take, sleeper)
    queue = _join(store, waiter, decision)
    try:
        while True:
            if (commands := queue.todo(waiter)) is not None:
                _carry(queue, commands)
            elif waiter.place == OVER:
                return _outcome(waiter)
            elif not store.clock.rest(sleeper, queue.rest(waiter)):
                queue.rested(waiter)
    except BaseException:
        queue.leave(waiter)
        while (commands := queue.todo(waiter)) is not None:
            _carry(queue, commands)
        raise


async def wait_async(store: Store, take: Take, decision: Decision | None = None) -> Decision:
    """Stand in line until the take may act, or is refused; return the decision.

    `decision`: the promise it already has. Whatever interrupts the wait gives the place back.
    Raises `StoreUnavailable` when the store does not answer.
    """
    import asyncio

    sleeper = TaskSleeper(asyncio.get_running_loop())
    waiter = Waiter(take, sleeper)
    queue = _join(store, waiter, decision)
    try:
        while True:
            if (commands := queue.todo(waiter)) is not None:
                _send(queue, commands)
            elif waiter.place == OVER:
                return _outcome(waiter)
            elif not await store.clock.rest_async(sleeper, queue.rest(waiter)):
                queue.rested(waiter)
    except BaseException as reason:
        queue.leave(waiter)
        if isinstance(reason, GeneratorExit) and not store.local:
            raise  # the loop is gone: what is to be given back waits for the next to come
        while (commands := queue.todo(waiter)) is not None:
            if (sending := _send(queue, commands)) is not None:
                await asyncio.shield(sending)
        raise


def ask(store: Store, take: Take) -> Decision:
    """Ask the store once, without a place in the queue."""
    decision: Decision = _reply(store.run((take,)))
    return decision


async def ask_async(store: Store, take: Take) -> Decision:
    """Ask the store once, without a place in the queue; what a cancelled ask got is given back."""
    if store.local:
        return ask(store, take)
    import asyncio

    asking = _keep(store.run_async((take,)))
    try:
        decision: Decision = _reply(await asyncio.shield(asking))
    except asyncio.CancelledError:
        asking.add_done_callback(lambda _: _undo(store, take, asking))
        raise
    return decision


def give(store: Store, command: Give) -> tuple[float, ...]:
    """Correct or cancel the charges of a permit; return what each counts for now."""
    queue: Queue | None = store.queues.get(command.key.tag)
    amended = queue.amend(command) if queue is not None else None
    if queue is None or amended is None:
        counts: tuple[float, ...] = _reply(store.run((command,)))
    else:
        counts = _reply(_carry(queue, amended[0]), amended[1])
    return counts


async def give_async(store: Store, command: Give) -> tuple[float, ...]:
    """Correct or cancel the charges of a permit; return what each counts for now."""
    if store.local:
        return give(store, command)
    import asyncio

    counts: tuple[float, ...] = _reply(await asyncio.shield(_keep(store.run_async((command,)))))
    return counts


def _reply(replies: Sequence[Reply], index: int = 0) -> Any:
    reply = replies[index]
    if isinstance(reply, Exception):
        raise reply
    return reply


def _carry(queue: Queue, commands: Sequence[Command]) -> Sequence[Reply]:
    """Carry out what `todo` said and tell the queue what came of it; return the replies."""
    try:
        if commands:
            replies = queue.store.run(commands)
            queue.answered(replies)
            return replies
        until = queue.store.look(queue.key)
        queue.answered(())
        queue.held(until)
    except Exception as error:
        queue.failed(error)
        return [error] * len(commands)
    except BaseException:
        queue.interrupted()
        raise
    return ()


async def _carry_async(queue: Queue, commands: Sequence[Command]) -> Sequence[Reply]:
    """Carry out what `todo` said and tell the queue what came of it; return the replies."""
    try:
        if commands:
            replies = await queue.store.run_async(commands)
            queue.answered(replies)
            return replies
        until = await queue.store.look_async(queue.key)
        queue.answered(())
        queue.held(until)
    except Exception as error:
        queue.failed(error)
        return [error] * len(commands)
    except BaseException:
        queue.interrupted()
        raise
    return ()


async def _carry_on_async(queue: Queue, commands: Sequence[Command] | None) -> None:
    while commands is not None:
        await _carry_async(queue, commands)
        commands = queue.todo(None)


def _send(queue: Queue, commands: Sequence[Command]) -> asyncio.Task[None] | None:
    """Carry out what `todo` said on nobody's behalf: a cancellation must not cut the store off."""
    if queue.store.local:
        _carry(queue, commands)
        return None
    return _keep(_carry_on_async(queue, commands))


@atexit.register
def _return_promises() -> None:
    """Give back what daemon threads were promised, so that other processes need not wait for it."""
    for store in list(stores):
        for queue in [] if store.local else list(store.queues.values()):
            try:
                if gives := queue.abandon():
                    store.run(gives)
            except Exception:
                break  # the store is gone, and so is the process


_kept: set[asyncio.Task[Any]] = set()


def _keep(work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """Run work in a task that lives until it is done, whoever waits for it."""
    import asyncio

    task = asyncio.get_running_loop().create_task(work)
    _kept.add(task)
    task.add_done_callback(_done)
    return task


def _done(task: asyncio.Task[Any]) -> None:
    _kept.discard(task)
    if not task.cancelled():
        task.exception()  # whoever waits for it has it; nobody else needs a line in the log


def _undo(store: Store, take: Take, asking: asyncio.Task[Sequence[Reply]]) -> None:
    if not asking.cancelled() and asking.exception() is None:
        decision = asking.result()[0]
        if isinstance(decision, Decision) and decision.granted:
            _keep(store.run_async((give_back(take, decision),)))
