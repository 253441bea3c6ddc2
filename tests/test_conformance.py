"""Other limiters' numbers, asked of ours through its public face, in memory and in Redis.

Tier `core` must be answered exactly. What ours answers in the tiers `choice` and `deviation` is in
the tables `CHOICES` and `DEVIATIONS`, each with its reason; docs/design.md cites them.

The cases of ratelimit_headers.json are about HTTP headers, which come with `throttle.integrations`
in a later issue. `NOT_YET` names them, so that they are left out knowingly.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import math
import pkgutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import throttle.redis
from tests import servers
from throttle import (
    ConfigurationError,
    CostExceedsLimit,
    MemoryStore,
    Permit,
    Quota,
    RateLimiter,
    RateLimitExceeded,
    RedisStore,
    Store,
)
from throttle.testing import VirtualClock

FOLDER = Path(__file__).parent / "conformance"
COVERED = ("go_x_time_rate.json", "redis_rate.json")
NOT_YET = ("ratelimit_headers.json",)

BEGIN = 1_700_000_000 * 1_000_000
EXACT = 1e-6
SMALLEST_LIMIT = 1e-300
LARGEST_LIMIT = 1e15

FILES = {name: json.loads((FOLDER / name).read_text()) for name in COVERED}
CASES = {case["id"]: case for name in COVERED for case in FILES[name]["cases"]}


def of_tier(tier: str) -> list[str]:
    return [name for name, case in CASES.items() if case["tier"] == tier]


# ------------------------------------------------------------------ time and stores


class Time(VirtualClock):
    """Virtual time that a test may set, back too; for tasks it moves only when the test says so."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__()
        self._now = BEGIN

    def set(self, nanoseconds: int) -> None:
        self._now = BEGIN + nanoseconds // 1000

    @property
    def somebody_rests(self) -> bool:
        return bool(self._resting)

    def _tick_on(self, loop: asyncio.AbstractEventLoop) -> None:
        pass


class ClockedRedis(RedisStore):
    """The Redis store in virtual time, whose script is told the time."""

    def __init__(self, url: str, time: Time) -> None:
        super().__init__(url, timeout=10)
        self.clock = time

    def _encode(self, commands: Any) -> Any:
        query = super()._encode(commands)
        seconds, rest = divmod(self.clock.now(), 1_000_000)
        told = throttle.redis._arguments(b"%d" % seconds, b"%d" % rest)
        return query._replace(words=query.words + 2, rest=query.rest + told)


MakeStore = Callable[[Time], Store]


@pytest.fixture(scope="module", params=["memory", *servers.kinds()])
def make_store(request: pytest.FixtureRequest) -> Iterator[MakeStore]:
    """Make a store on a clock: memory, or Redis with a script that differs in its time alone."""
    if request.param == "memory":
        yield lambda time: MemoryStore(clock=time)
        return
    server = servers.start(request.param)
    text = pkgutil.get_data("throttle", "take.lua")
    assert text is not None
    for line, other in [
        (b'local time = redis.call("TIME")', b"local time = { ARGV[3], ARGV[4] }"),
        # The keys go by the server's clock: they stay until the case is over.
        (b"local GRACE = 1000000", b"local GRACE = 3600 * 1000000"),
    ]:
        assert text.count(line) == 1
        text = text.replace(line, other)
    digest = hashlib.sha1(text).hexdigest().encode()
    script = throttle.redis._Script(
        throttle.redis._arguments(b"EVALSHA", digest), throttle.redis._arguments(b"EVAL", text)
    )
    stores: list[Store] = []

    def make(time: Time) -> Store:
        stores.append(ClockedRedis(server.url, time))
        return stores[-1]

    patch = pytest.MonkeyPatch()
    patch.setattr(throttle.redis, "_script", lambda: script)
    yield make
    patch.undo()
    for store in stores:
        store.close()
    server.stop()


# ------------------------------------------------------------------ one case on our limiter

_numbers = itertools.count()


class Play:
    """Plays one case on a `RateLimiter`, and keeps what it answered: one dict for each step.

    A rate of 0 or infinity is a `ConfigurationError` for a `Quota`: 0 becomes `SMALLEST_LIMIT`,
    near the smallest that is allowed, and infinity `LARGEST_LIMIT`, the largest, with a burst to
    match (the cases say that an infinite rate ignores the burst, which is 0 there, and no burst).

    What our interface has no word for is said with its words: `try` is `peek` and `allow_request`,
    which must agree, and a refusal must say the same as `reserve(max_wait=0)`; `try_up_to` asks for
    no more than `peek` finds. `tokens` is `peek().remaining`, which is never negative. Times are
    seconds, as our interface gives them.
    """

    def __init__(self, case: dict[str, Any], make_store: MakeStore) -> None:
        self.case = case
        self.time = Time()
        self.config = dict(case["config"])
        self.store = make_store(self.time)
        self.limiter = RateLimiter(
            f"case-{next(_numbers)}", quotas=[self.quota()], store=self.store
        )
        self.permits: dict[str, Permit] = {}
        self.acts: dict[Permit, tuple[float, float]] = {}
        """Of each permit that counts: when its call goes, and what it takes."""
        self.answers: list[dict[str, Any]] = []
        for step in case["steps"]:
            self.time.set(step["t_ns"])
            arguments = {k: v for k, v in step.items() if k not in ("t_ns", "op", "expect")}
            self.answers.append(getattr(self, step["op"])(**arguments))

    def quota(self) -> Quota:
        limit, burst = self.config["limit"], self.config["burst"]
        if limit == "inf":
            limit = burst = LARGEST_LIMIT
        return Quota(limit or SMALLEST_LIMIT, self.config["period_ns"] / 1e9, burst)

    def tokens(self) -> dict[str, Any]:
        return {"tokens": self.limiter.peek().remaining}

    def attempt(self, n: float) -> bool:
        foreseen = self.limiter.peek(n)
        if foreseen.retry_after is not None:
            with pytest.raises(RateLimitExceeded) as refused:
                self.limiter.reserve(n, max_wait=0)
            told = refused.value.retry_after
            assert told == (None if foreseen.retry_after == math.inf else foreseen.retry_after)
        allowed = self.limiter.allow_request(n)
        assert allowed == (foreseen.retry_after is None)
        return allowed

    def try_(self, n: float) -> dict[str, Any]:
        retry_after = self.limiter.peek(n).retry_after
        return {"allowed": self.attempt(n), "retry_after": retry_after, **self.left()}

    def try_up_to(self, n: float) -> dict[str, Any]:
        granted = min(n, self.limiter.peek().remaining)
        retry_after = self.limiter.peek(min(n, 1)).retry_after
        assert self.attempt(granted)
        return {"granted": granted, "retry_after": retry_after, **self.left()}

    def left(self) -> dict[str, Any]:
        status = self.limiter.peek(0)
        return {"remaining": status.remaining, "reset_after": status.reset_after}

    def reserve(
        self, n: float, max_wait_ns: int | None = None, id: str | None = None
    ) -> dict[str, Any]:
        max_wait = None if max_wait_ns is None else max_wait_ns / 1e9
        try:
            permit = self.limiter.reserve(n, max_wait=max_wait)
        except RateLimitExceeded:
            return {"ok": False}
        if id is not None:
            self.permits[id] = permit
        self.acts[permit] = (self.time.now() / 1e6 + permit.delay, n)
        return {"ok": True, "delay": permit.delay}

    def cancel(self, ref: str) -> dict[str, Any]:
        permit = self.permits.pop(ref, None)
        if permit is not None:  # what was refused has no permit: there is nothing to cancel
            permit.cancel()
            del self.acts[permit]
        return {}

    def wait(
        self,
        n: float,
        timeout_ns: int | None = None,
        cancel_after_ns: int | None = None,
        already_cancelled: bool = False,
    ) -> dict[str, Any]:
        began = self.time.now()
        max_wait = None if timeout_ns is None else timeout_ns / 1e9
        error = None
        try:
            if already_cancelled or cancel_after_ns is not None:
                asyncio.run(self.cancelled_wait(n, max_wait, cancel_after_ns))
                error = "cancelled"
            else:
                self.limiter.acquire(n, max_wait=max_wait)
        except CostExceedsLimit:
            error = "over_burst"
        except RateLimitExceeded:
            error = "deadline"
        answer = {"ok": error is None, "delay": (self.time.now() - began) / 1e6}
        return answer if error is None else {**answer, "error": error}

    async def cancelled_wait(
        self, n: float, max_wait: float | None, cancel_after_ns: int | None
    ) -> None:
        waiting = asyncio.ensure_future(self.limiter.acquire_async(n, max_wait=max_wait))
        if cancel_after_ns is not None:
            while not (self.time.somebody_rests or waiting.done()):
                await asyncio.sleep(0.001)
            self.time.advance(cancel_after_ns / 1e9)
            await asyncio.sleep(0.01)
            assert not waiting.done()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await self.store.aclose()

    def set_limit(self, limit: float) -> dict[str, Any]:
        self.config["limit"] = limit
        self.limiter.quotas = [self.quota()]
        return {}

    def set_burst(self, burst: float) -> dict[str, Any]:
        self.config["burst"] = burst
        self.limiter.quotas = [self.quota()]
        return {}

    def concurrent_try(self, n: float, callers: int) -> dict[str, Any]:
        answers: list[bool] = []
        barrier = threading.Barrier(callers)

        def call() -> None:
            barrier.wait(60)
            answers.append(self.limiter.allow_request(n))

        threads = [threading.Thread(target=call) for _ in range(callers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len(answers) == callers
        return {"allowed_count": sum(answers)}

    def poll_try(self, n: float, every_ns: int, until_ns: int) -> dict[str, Any]:
        allowed = 0
        for now in range(0, until_ns + 1, every_ns):
            self.time.set(now)
            allowed += self.limiter.allow_request(n)
        return {"allowed_count": allowed}

    def check_the_bound(self) -> None:
        """No interval has more than burst + rate * seconds of what is reserved."""
        quota = self.limiter.quotas[0]
        rate = quota.limit / quota.window
        acts = sorted(self.acts.values())
        for first, (begin, _) in enumerate(acts):
            taken = 0.0
            for end, n in acts[first:]:
                taken += n
                assert taken <= quota.burst + rate * (end - begin + 2 * EXACT), acts


setattr(Play, "try", Play.try_)


def as_ours(expect: dict[str, Any]) -> dict[str, Any]:
    """Return what a case expects in our units: seconds; nothing negative; infinity for never."""
    ours: dict[str, Any] = {}
    for name, value in expect.items():
        if name == "tokens":
            ours[name] = max(value, 0)
        elif name.endswith("_ns"):
            seconds = math.inf if value == "never" else value
            ours[name.removesuffix("_ns")] = seconds if seconds is None else seconds / 1e9
        else:
            ours[name] = value
    return ours


def check(step: dict[str, Any], answer: dict[str, Any], expect: dict[str, Any], where: str) -> None:
    for name, value in expect.items():
        if name == "allowed_count_min":
            assert answer["allowed_count"] >= value, where
        elif name == "allowed_count_max":
            assert answer["allowed_count"] <= value, where
        elif isinstance(value, float) and answer[name] is not None:
            assert answer[name] == pytest.approx(value, rel=0, abs=EXACT), (where, name, step)
        else:
            assert answer[name] == value, (where, name, step)


# ------------------------------------------------------------------ what is covered


def test_every_file_of_cases_is_covered_or_left_for_later_by_name() -> None:
    assert sorted(path.name for path in FOLDER.glob("*.json")) == sorted([*COVERED, *NOT_YET])
    for name in NOT_YET:
        cases = json.loads((FOLDER / name).read_text())["cases"]
        assert not any("steps" in case for case in cases), f"{name} has cases for a limiter"


def test_every_case_is_of_a_tier_that_is_tested() -> None:
    assert len(CASES) == sum(len(file["cases"]) for file in FILES.values())
    assert {case["tier"] for case in CASES.values()} == {"core", "choice", "deviation"}
    assert {case["model"] for case in CASES.values()} == {"token_bucket"}
    assert set(of_tier("choice")) == set(CHOICES)
    assert set(of_tier("deviation")) == set(DEVIATIONS)


def test_every_question_that_a_case_asks_is_answered() -> None:
    for case in CASES.values():
        for step in case["steps"]:
            known = {"tokens", "allowed", "remaining", "retry_after_ns", "reset_after_ns"}
            known |= {"granted", "ok", "delay_ns", "error", "allowed_count"}
            known |= {"allowed_count_min", "allowed_count_max"}
            assert set(step.get("expect", {})) <= known, case["id"]


# ------------------------------------------------------------------ core


@pytest.mark.parametrize("name", of_tier("core"))
def test_core_cases_are_answered_exactly(name: str, make_store: MakeStore) -> None:
    play = Play(CASES[name], make_store)
    play.check_the_bound()
    for number, (step, answer) in enumerate(zip(play.case["steps"], play.answers, strict=True)):
        check(step, answer, as_ours(step.get("expect", {})), f"{name} step {number}")


# ------------------------------------------------------------------ choice and deviation


class Ours(NamedTuple):
    """Why we answer a case as we do, and by step what differs from the original's answer."""

    reason: str
    differs: dict[int, dict[str, Any]]


CHOICES = {
    "go.cancel_too_late": Ours(
        "Rule 4: a permit that is cancelled after its act time was not used either, and what the "
        "bound allows is given back: here all of it.",
        {3: {"delay": 0}},
    ),
    "go.cancel_0_tokens": Ours(
        "As the original: a permit is promised 0.1 s later, and by rule 4 that is worth all of "
        "this one. Giving it back (token-exact) is within the bound here, but not in general; "
        "rule 5 would see that, but its peaks are kept by epochs of 2 s.",
        {},
    ),
    "go.cancel_1_token": Ours(
        "As the original: 1 of 2 is given back. All of it would break the bound.",
        {},
    ),
    "go.cancel_multi": Ours(
        "As the original: the newest is given back whole, as if it had never been asked for, and "
        "of the other what its successor leaves.",
        {},
    ),
    "go.set_limit": Ours(
        "As the original (rule 8): what is in the bucket stays, a debt is paid at the new rate, "
        "and promises already made keep their times and come on top.",
        {},
    ),
    "go.set_burst": Ours(
        "A raised burst adds no tokens, as in the original. There the bucket is brought up to the "
        "0.3 s of the change, and the older time of the last step finds that paid already. New "
        "quotas ask our store nothing, so it never saw that time: at 0 the debt is still whole.",
        {3: {"delay": 1.2}},
    ),
}
"""The cases that limiters may answer in more than one way."""

DEVIATIONS = {
    "go.jump_backwards": Ours(
        "Not the recommended clamp, which freezes a bucket for as long as the clock went back: "
        "rule 9 shifts the stored times by the jump. Nothing extra is admitted at the jump itself, "
        "and time counts from there. These are the original's answers.",
        {},
    ),
    "go.reserve_jump_back": Ours(
        "Rule 9 again. Steps 3 and 5 are refused and take nothing. Step 3 is refused without the "
        "store. Step 5 reaches it, and the jump is shifted away on a refusal too (an hour's jump "
        "must not freeze anyone for an hour), so that the 0.2 s from then to step 6 count.",
        {6: {"delay": 0.1}},
    ),
    "go.reserve_jump_back_cancel": Ours(
        "A cancel after the clock went back gives nothing back unless it is the newest: the act "
        "times from before the jump say nothing any more, and the peaks of rule 5 are forgotten.",
        {4: {"delay": 0.4}},
    ),
    "redis_rate.over_burst_retry": Ours(
        "As recommended: a cost above the burst can never go, and no caller may wait for it.",
        {1: {"retry_after": math.inf}},
    ),
}
"""The cases whose original answer is one not to copy."""


@pytest.mark.parametrize("name", [*CHOICES, *DEVIATIONS])
def test_where_limiters_differ_ours_answers_as_it_says_and_says_why(
    name: str, make_store: MakeStore
) -> None:
    reason, ours = (CHOICES | DEVIATIONS)[name]
    assert reason.endswith(".")
    play = Play(CASES[name], make_store)
    for number, (step, answer) in enumerate(zip(play.case["steps"], play.answers, strict=True)):
        theirs = as_ours(step.get("expect", {}))
        differs = ours.get(number, {})
        assert all(differs[key] != theirs[key] for key in differs), "it does not differ"
        check(step, answer, {**theirs, **differs}, f"{name} step {number}")


@pytest.mark.parametrize("name", [name for name in CHOICES if "cancel" in name])
def test_whatever_a_cancel_gives_back_the_bound_is_kept(name: str, make_store: MakeStore) -> None:
    Play(CASES[name], make_store).check_the_bound()


def test_the_recommended_never_is_what_we_say(make_store: MakeStore) -> None:
    case = CASES["redis_rate.over_burst_retry"]
    assert case["recommended"] == {"retry_after_ns": "never"}
    play = Play(case, make_store)
    assert play.limiter.peek(1000).retry_after == math.inf
    with pytest.raises(CostExceedsLimit) as refused:
        play.limiter.acquire(1000)
    assert refused.value.retry_after is None


# ------------------------------------------------------------------ properties and conversions


def blank(limit: float, period_ns: int, burst: float, make_store: MakeStore) -> Play:
    config = {"limit": limit, "period_ns": period_ns, "burst": burst}
    return Play({"config": config, "steps": []}, make_store)


def test_no_refusal_of_redis_rates_retry_bound_is_longer_than_one_interval(
    make_store: MakeStore,
) -> None:
    play = blank(1, 1_000_000, 1, make_store)
    for number in range(1000):
        play.time.set(number * 7_000)
        retry_after = play.limiter.peek().retry_after
        assert retry_after is None or 0 < retry_after <= 0.001 + 1e-9
        assert play.limiter.allow_request() == (retry_after is None)


def test_a_partial_grant_does_not_lose_the_fraction_that_is_left(make_store: MakeStore) -> None:
    play = blank(10, 1_000_000_000, 10, make_store)
    assert play.try_up_to(10)["granted"] == 10
    play.time.set(250_000_000)
    assert play.try_up_to(5)["granted"] == 2
    play.time.set(300_000_000)
    assert play.try_up_to(5)["granted"] == 1


CONVERSIONS = FILES["go_x_time_rate.json"]["conversions"]


@pytest.mark.parametrize("row", CONVERSIONS["rows"])
def test_one_call_in_each_interval_is_the_rate_that_it_says(row: dict[str, Any]) -> None:
    interval = row["interval_ns"] / 1e9
    if not 1e-6 <= interval <= 366 * 86_400:
        # From 0 (infinity, there) to below a microsecond, and beyond a year: refused here.
        with pytest.raises(ConfigurationError):
            Quota(1, interval)
        return
    quota = Quota(1, interval)
    tolerance = CONVERSIONS["relative_tolerance"]
    assert quota.limit / quota.window == pytest.approx(row["rate_per_s"], rel=tolerance)


@pytest.mark.parametrize("limit", [0, math.inf, -1, math.nan])
def test_rates_of_zero_and_infinity_are_refused(limit: float) -> None:
    with pytest.raises(ConfigurationError, match="limit"):
        Quota(limit, 1)
