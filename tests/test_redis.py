"""The Redis store against real servers and real faults: keys, deadlines, forks, loops, errors."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import os
import pickle
import re
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import redis.asyncio
from hypothesis import given
from hypothesis import strategies as st

from tests import servers
from throttle.errors import ConfigurationError, StoreUnavailable
from throttle.keys import Key, escaped
from throttle.quota import Quota
from throttle.redis import CONNECTIONS, KeyUnusable, NoConnectionFree, RedisStore
from throttle.store import LONG_AGO
from throttle.take import LOOK, Charge, Command, Decision, Give, Hold, Reset, Take

ROOT = Path(__file__).parents[1]
OPENAI = Key("openai")
TEN = (Quota(10, 1),)
HOURLY = (Quota(1000, 3600),)
WINDOW = (Quota(1000, 3600, algorithm="sliding_window"),)
BUCKET_KEY = "rate_limit:{openai}:requests:3600000000:t"
HOLD_KEY = "rate_limit:{openai}:hold"


@pytest.fixture(scope="module", params=servers.kinds())
def running(request: pytest.FixtureRequest) -> Iterator[servers.Server]:
    server = servers.start(request.param)
    yield server
    server.stop()


@pytest.fixture
def raw(running: servers.Server) -> Iterator[Any]:
    """A client of redis-py, on an empty server."""
    client = redis.Redis(port=running.port)
    client.flushall()
    yield client
    client.close()


@pytest.fixture
def server(running: servers.Server, raw: Any) -> servers.Server:
    return running


@pytest.fixture
def store(server: servers.Server) -> Iterator[RedisStore]:
    store = RedisStore(server.url, timeout=5)
    yield store
    store.close()


@pytest.fixture(scope="module")
def own_server() -> Iterator[servers.Server]:
    """A server to be killed, paused and configured."""
    server = servers.start(servers.kinds()[0])
    yield server
    server.stop()


Run = Callable[[RedisStore, list[Command]], list[Any]]


def blocking(store: RedisStore, commands: list[Command]) -> list[Any]:
    return store.run(commands)


def in_a_task(store: RedisStore, commands: list[Command]) -> list[Any]:
    return asyncio.run(store.run_async(commands))


@pytest.fixture(params=[blocking, in_a_task])
def run(request: pytest.FixtureRequest) -> Run:
    """Both faces of the store."""
    face: Run = request.param
    return face


# ----------------------------------------------------------------------------- what it answers


def test_takes_are_granted_until_the_burst_is_spent_and_then_told_when(
    store: RedisStore, run: Run
) -> None:
    for left in range(9, -1, -1):
        (decision,) = run(store, [Take(OPENAI, TEN, (1,), 0)])
        assert decision.granted
        assert left <= decision.levels[0] < left + 1
    # All of the burst went within less than the tenth of a second that one more takes.
    (refused,) = run(store, [Take(OPENAI, TEN, (2,), 0)])
    assert not refused.granted
    assert 0 < refused.act - refused.now <= 200_000
    assert refused.receipts == ()


def test_a_batch_is_answered_in_order_and_each_command_sees_those_before_it(
    store: RedisStore, run: Run
) -> None:
    both = (Quota(10, 60), Quota(100, 60, unit="tokens", algorithm="sliding_window"))
    (first,) = run(store, [Take(OPENAI, both, (1, 40), math.inf)])
    charges = tuple(
        Charge(quota, cost, receipt)
        for quota, cost, receipt in zip(both, (1, 40), first.receipts, strict=True)
    )
    counts, held, looked, reset, after = run(
        store,
        [
            Give(OPENAI, charges, first.act, (1, 15), False),
            Hold(OPENAI, both, 3_000_000),
            Take(OPENAI, both, (1, 1), LOOK),
            Reset(OPENAI, both),
            Take(OPENAI, both, (1, 0), 0),
        ],
    )
    assert counts == (1, 15)
    assert held == looked.hold == looked.now + 3_000_000
    assert not looked.granted
    assert looked.levels == (0, 85)
    assert reset is None
    assert after.granted
    assert after.hold == LONG_AGO
    assert after.levels == (9, 100)
    assert after.receipts[1] is None


def test_no_command_is_no_round_trip(run: Run) -> None:
    assert run(RedisStore("redis://127.0.0.1:1"), []) == []


def test_a_hold_is_seen_by_a_look(store: RedisStore) -> None:
    assert store.look(OPENAI) == LONG_AGO
    (end,) = store.run([Hold(OPENAI, TEN, 5_000_000)])
    assert store.look(OPENAI) == end
    assert asyncio.run(store.look_async(OPENAI)) == end
    (end_of_shorter,) = store.run([Hold(OPENAI, TEN, 1_000_000)])
    assert end_of_shorter == end
    store.run([Reset(OPENAI, TEN)])
    assert store.look(OPENAI) == LONG_AGO


def test_two_stores_share_a_bucket_and_two_prefixes_do_not(server: servers.Server) -> None:
    mine, yours = RedisStore(server.url), RedisStore(server.url)
    other = RedisStore(server.url, prefix="other")
    mine.run([Take(OPENAI, HOURLY, (600,), 0)])
    assert not yours.run([Take(OPENAI, HOURLY, (600,), 0)])[0].granted
    assert other.run([Take(OPENAI, HOURLY, (600,), 0)])[0].granted


# --------------------------------------------------------------------------- keys and lifetimes


def test_keys_are_named_by_prefix_hash_tag_and_quota(store: RedisStore, raw: Any) -> None:
    both = (*HOURLY, *WINDOW)
    store.run([Take(OPENAI, both, (1, 1), 0), Hold(OPENAI, both, 1_000_000)])
    store.run([Take(Key("twilio", "+1555"), TEN, (1,), 0)])
    store.run([Take(Key("twilio", "{a}\r\n*"), TEN, (1,), 0)])
    assert set(raw.keys()) == {
        b"rate_limit:{openai}:hold",
        b"rate_limit:{openai}:requests:3600000000:t",
        b"rate_limit:{openai}:requests:3600000000:s",
        b"rate_limit:{twilio|+1555}:requests:1000000:t",
        b"rate_limit:{twilio|%b}:requests:1000000:t" % escaped("{a}\r\n*").encode(),
    }


@given(st.text())
def test_any_text_becomes_a_short_safe_piece_of_a_key(text: str) -> None:
    assert re.fullmatch(r"[A-Za-z0-9._/+@:-]{1,64}|#[0-9a-f]{32}", escaped(text))


NAMES = st.one_of(
    st.text(max_size=4), st.sampled_from(["a", "a:b", "b:c", "c", "", "a|b", "#", "x" * 65])
)
KEYS = st.tuples(NAMES, st.one_of(st.none(), NAMES))


@given(KEYS, KEYS)
def test_different_keys_have_different_tags(one: Any, two: Any) -> None:
    tags = {Key(name, partition).tag for name, partition in (one, two)}
    assert len(tags) == len({one, two})
    for text in tags:
        assert "{" not in text
        assert "}" not in text


def test_keys_with_one_text_but_other_parts_do_not_meet(store: RedisStore) -> None:
    one, two = Key("a:b", "c"), Key("a", "b:c")
    store.run([Take(one, HOURLY, (1000,), 0)])
    assert store.run([Take(two, HOURLY, (1000,), 0)])[0].granted


def test_nothing_is_left_behind_once_a_bucket_is_full_again(store: RedisStore, raw: Any) -> None:
    quick = (Quota(10, 0.1), Quota(10, 0.1, algorithm="sliding_window"))
    store.run([Take(OPENAI, quick, (10, 10), 0), Hold(OPENAI, quick, 50_000)])
    assert len(raw.keys()) == 3
    for key in raw.scan_iter():
        assert 1000 <= raw.pttl(key) <= 1300
    time.sleep(1.4)
    assert raw.keys() == []


@pytest.mark.parametrize("quotas", [HOURLY, WINDOW])
def test_a_key_lives_until_it_is_full_and_past_a_hold_and_never_shorter(
    store: RedisStore, raw: Any, quotas: tuple[Quota, ...]
) -> None:
    (decision,) = store.run([Take(OPENAI, quotas, (500,), 0)])
    (key,) = raw.keys()
    full = (decision.full_at[0] - decision.now) / 1e6
    assert full - 1 < raw.pttl(key) / 1000 <= full + 1.1
    charge = Charge(quotas[0], 500, decision.receipts[0])
    store.run([Give(OPENAI, (charge,), decision.act, (1,), False)])
    assert full - 1 < raw.pttl(key) / 1000
    store.run([Hold(OPENAI, quotas, 20_000 * 1_000_000)])
    assert raw.pttl(key) / 1000 > 20_000
    assert raw.pttl(HOLD_KEY) / 1000 > 20_000
    store.run([Reset(OPENAI, quotas)])
    assert raw.pttl(key) / 1000 > 19_000
    assert not raw.exists(HOLD_KEY)


def test_the_longest_promise_does_not_break_the_expiry(store: RedisStore, raw: Any) -> None:
    slow = (Quota(1e-6, 366 * 86400, burst=1),)
    assert store.run([Take(OPENAI, slow, (1,), 0)])[0].granted
    assert store.run([Take(OPENAI, slow, (1,), math.inf)])[0].granted
    (key,) = raw.keys()
    assert raw.pttl(key) <= 10 * 366 * 86400 * 1000
    store.run([Hold(OPENAI, slow, 1 << 60 >> 8)])
    assert raw.pttl(key) <= 10 * 366 * 86400 * 1000


@pytest.mark.parametrize("quotas", [HOURLY, WINDOW])
def test_what_takes_nothing_writes_nothing(
    store: RedisStore, raw: Any, quotas: tuple[Quota, ...]
) -> None:
    store.run([Take(OPENAI, quotas, (0,), 0), Take(OPENAI, quotas, (1,), LOOK)])
    assert raw.keys() == []
    (decision,) = store.run([Take(OPENAI, quotas, (900,), 0)])
    (key,) = raw.keys()
    before = raw.get(key)
    lower = (Quota(10, 3600, algorithm=quotas[0].algorithm),)
    charge = Charge(quotas[0], 900, decision.receipts[0])
    store.run(
        [
            Take(OPENAI, quotas, (200,), 0),
            Take(OPENAI, lower, (11,), 0),
            Take(OPENAI, quotas, (0,), 0),
            Give(OPENAI, (charge,), decision.act, (900,), False),
        ]
    )
    assert raw.get(key) == before
    assert raw.keys() == [key]


def test_a_reset_leaves_a_mark_and_old_charges_are_not_given_back(
    store: RedisStore, raw: Any
) -> None:
    (decision,) = store.run([Take(OPENAI, HOURLY, (400,), 0)])
    charge = Charge(HOURLY[0], 400, decision.receipts[0])
    store.run([Reset(OPENAI, HOURLY), Take(OPENAI, HOURLY, (1000,), 0)])
    assert raw.exists(BUCKET_KEY)
    assert store.run([Give(OPENAI, (charge,), decision.act, (0,), True)]) == [(400,)]
    assert not store.run([Take(OPENAI, HOURLY, (10,), 0)])[0].granted


def test_a_give_to_a_bucket_that_is_gone_credits_nothing_and_charges_debt(
    store: RedisStore, raw: Any
) -> None:
    (decision,) = store.run([Take(OPENAI, HOURLY, (400,), 0)])
    charge = Charge(HOURLY[0], 400, decision.receipts[0])
    raw.flushall()
    assert store.run([Give(OPENAI, (charge,), decision.act, (0,), True)]) == [(400,)]
    assert raw.keys() == []
    assert store.run([Give(OPENAI, (charge,), decision.act, (600,), False)]) == [(600,)]
    (after,) = store.run([Take(OPENAI, HOURLY, (1,), LOOK)])
    assert after.levels[0] == pytest.approx(800, abs=1)


# ------------------------------------------------------------- values that are not as they should


@pytest.mark.parametrize("jump", [3600, -3600])
@pytest.mark.parametrize("quotas", [TEN, (Quota(10, 1, algorithm="sliding_window"),)])
def test_a_jump_of_the_servers_clock_freezes_nobody_longer_than_a_window(
    store: RedisStore, raw: Any, quotas: tuple[Quota, ...], jump: int
) -> None:
    store.run([Take(OPENAI, quotas, (10,), 0), Hold(OPENAI, quotas, 100_000)])
    # The clock went back by an hour, or forward: all that was stored is off by as much.
    for key in list(raw.scan_iter()):
        value = raw.get(key)
        if key.endswith(b":hold"):
            raw.set(key, " ".join(str(int(word) + jump * 1_000_000) for word in value.split()))
            continue
        numbers = list(struct.unpack(f"<{len(value) // 8}d", value))
        moved = [1, 4, 9] if key.endswith(b":t") else [0, 4, *range(7, len(numbers), 2)]
        for place in moved:
            numbers[place] += jump * 1_000_000
        raw.set(key, struct.pack(f"<{len(numbers)}d", *numbers))
    (refused,) = store.run([Take(OPENAI, quotas, (10,), 0)])
    if jump < 0:
        # An hour passed in a moment: at most one burst more.
        assert refused.granted
        return
    assert not refused.granted
    assert refused.act - refused.now <= 1_200_000
    time.sleep((refused.act - refused.now) / 1e6)
    assert store.run([Take(OPENAI, quotas, (10,), 200_000)])[0].granted


def doubles(*numbers: float) -> bytes:
    return struct.pack(f"<{len(numbers)}d", *numbers)


NOW = 1.8e15
GOOD = (1, NOW, 1, 10, NOW, NOW, NOW, NOW, NOW, NOW)
ONE_ACT = (NOW, 0, NOW, NOW, NOW, 0, 1, NOW, 1)
TAMPERED = [
    b"",
    b"x",
    b"x" * 56,
    b"x" * 80,
    b"\xff" * 80,
    b"\x00" * 7,
    b"\x00" * 56,
    b"\x00" * 80 * 99,
    *(
        doubles(*GOOD[:place], bad, *GOOD[place + 1 :])
        for place in range(10)
        for bad in (math.nan, math.inf, -math.inf, 1e300, -1e300, 0)
    ),
    doubles(-1e300, NOW, 1e-300, 1e-300, NOW, NOW, NOW, NOW, NOW, NOW),
    doubles(*GOOD, 5, math.nan),
    doubles(*GOOD, math.nan, 5),
    doubles(*GOOD, 5),
    *(
        doubles(*ONE_ACT[:place], bad, *ONE_ACT[place + 1 :])
        for place in range(9)
        for bad in (math.nan, math.inf, 1e300, -1, 0.5)
    ),
    doubles(NOW, 0, NOW, NOW, NOW, 0, 5),
    doubles(NOW, 0, NOW, NOW, NOW, 0, 3, math.nan, 1, math.inf, math.nan, NOW, 1e9),
]


@pytest.mark.parametrize("value", TAMPERED)
@pytest.mark.parametrize("quotas", [HOURLY, WINDOW])
def test_a_value_that_is_none_of_ours_is_survived(
    store: RedisStore, raw: Any, quotas: tuple[Quota, ...], value: bytes
) -> None:
    key = BUCKET_KEY if quotas is HOURLY else BUCKET_KEY[:-1] + "s"
    raw.set(key, value)
    for _ in range(2):
        commands: list[Command] = [
            Take(OPENAI, quotas, (1,), 0),
            Take(OPENAI, quotas, (1,), math.inf),
            Hold(OPENAI, quotas, 1),
        ]
        for command in commands:
            (reply,) = store.run([command])
            if isinstance(reply, Decision):
                assert all(map(math.isfinite, reply.levels))
                assert abs(reply.act) <= 1 << 53
    store.run([Reset(OPENAI, quotas)])
    assert store.run([Take(OPENAI, quotas, (1000,), 0)])[0].granted


@pytest.mark.parametrize(
    "value", ["", "x", "nan nan", "inf 1", "1e3 1", "0x10 1", "9" * 30 + " 1", "- -", "1"]
)
def test_a_hold_that_is_no_number_is_none(store: RedisStore, raw: Any, value: str) -> None:
    raw.set(HOLD_KEY, value)
    assert store.run([Take(OPENAI, HOURLY, (1,), 0)])[0].granted
    assert store.look(OPENAI) == LONG_AGO


def test_a_wrong_typed_key_spoils_only_its_own_commands(
    store: RedisStore, raw: Any, run: Run
) -> None:
    raw.lpush(BUCKET_KEY, "x")
    raw.lpush("rate_limit:{held}:hold", "x")
    raw.lpush("rate_limit:{strict}:requests:3600000000:s", "x")
    held, strict, free = (Key(name) for name in ("held", "strict", "free"))
    replies: list[Any] = run(
        store,
        [
            Take(free, HOURLY, (1,), 0),
            Take(OPENAI, HOURLY, (1,), 0),
            Take(held, HOURLY, (1,), 0),
            Hold(held, HOURLY, 1000),
            Take(strict, WINDOW, (1,), 0),
            Take(free, HOURLY, (1,), 0),
        ],
    )
    assert [isinstance(reply, KeyUnusable) for reply in replies] == [
        False, True, True, True, True, False,
    ]  # fmt: skip
    assert replies[5].levels[0] == 998
    assert raw.type(BUCKET_KEY) == b"list"
    with pytest.raises(KeyUnusable, match="WRONGTYPE"):
        run(store, [Take(OPENAI, HOURLY, (1,), 0)])
    with pytest.raises(KeyUnusable):
        store.look(held)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none_are_refused_and_spoil_only_their_own_command(
    store: RedisStore, raw: Any, bad: float
) -> None:
    (decision,) = store.run([Take(OPENAI, HOURLY, (1,), 0)])
    charge = Charge(HOURLY[0], 1, decision.receipts[0])
    bad_quota = Quota(5, 3600)
    object.__setattr__(bad_quota, "limit", bad)
    before = raw.get(BUCKET_KEY)
    commands: list[Command] = [
        Take(OPENAI, HOURLY, (bad,), 0),
        Take(OPENAI, (bad_quota,), (1,), 0),
        Give(OPENAI, (charge,), decision.act, (bad,), False),
        Give(OPENAI, (charge._replace(counts=bad),), decision.act, (1,), False),
        Hold(OPENAI, HOURLY, bad),  # type: ignore[arg-type]
    ]
    if bad != bad:
        commands.append(Take(OPENAI, HOURLY, (1,), bad))
    *failed, good = store.run([*commands, Take(OPENAI, HOURLY, (1,), LOOK)])
    assert all(isinstance(reply, StoreUnavailable) for reply in failed)
    assert good.levels[0] == pytest.approx(999, abs=1)
    assert raw.get(BUCKET_KEY) == before


# ------------------------------------------------------------------------ what is told to people


@pytest.mark.parametrize(
    "url",
    [
        "http://user:hunter2@host/",
        "hunter2",
        "",
        "redis://",
        "redis:/0",
        "redis:hunter2",
        "redis+sentinel://user:hunter2@host/",
        "redis://user:hunter2@host:port/0",
        "redis://user:hunter2@host:99999/0",
        "redis://user:hun/ter2@host:6379/0",
        "redis://user:hun#ter2@host:6379/0",
        "redis://user:hun?ter2@host:6379/hunter2",
        "redis://user:hunter2@host/hunter2",
        "redis://user:hunter2@host/0?db=hunter2",
        "redis://user:hunter2@[host/0",
        "unix://",
        42,
        None,
        object(),
    ],
)
def test_a_url_that_makes_no_sense_is_refused_and_not_shown(url: Any) -> None:
    with pytest.raises(ConfigurationError) as caught:
        RedisStore(url)
    text = "".join(traceback.format_exception(caught.value))
    lines = [line for line in text.splitlines() if "url" not in line.lower() or "URL" in line]
    assert "ter2" not in str(caught.value)
    assert not any("ter2" in line for line in lines)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://localhost", "redis://localhost:6379/0"),
        ("redis://me:hunter2@10.0.0.1:7000/3", "redis://10.0.0.1:7000/3"),
        (
            "rediss://:hunter2@cache.example?db=2&ssl_cert_reqs=none",
            "rediss://cache.example:6379/2",
        ),
        ("redis://h/?password=hunter2&username=me", "redis://h:6379/0"),
        ("redis://[::1]:7000/1", "redis://[::1]:7000/1"),
        ("unix://me:hunter2@/tmp/redis.sock?db=1", "unix:///tmp/redis.sock?db=1"),
    ],
)
def test_the_repr_shows_where_it_is_and_no_secret(url: str, shown: str) -> None:
    store = RedisStore(url)
    assert store.address == shown
    assert repr(store) == f"RedisStore({shown!r}, prefix='rate_limit')"
    assert "hunter2" not in repr(store)


@pytest.mark.parametrize("prefix", ["", "{}", "a b", "x" * 65, "ü", None, 3, "a\n"])
def test_a_prefix_is_safe_and_not_empty(prefix: Any) -> None:
    with pytest.raises(ConfigurationError, match="prefix"):
        RedisStore("redis://localhost", prefix=prefix)


@pytest.mark.parametrize("timeout", [0, -1, math.nan, math.inf, "1", None, True])
def test_a_timeout_is_some_time(timeout: Any) -> None:
    with pytest.raises(ConfigurationError, match="timeout"):
        RedisStore("redis://localhost", timeout=timeout)


def test_a_refused_password_is_a_matter_of_configuration(
    own_server: servers.Server, run: Run
) -> None:
    guarded = servers.start(own_server.kind, "--requirepass", "correct-horse")
    try:
        right = RedisStore(f"redis://:correct-horse@127.0.0.1:{guarded.port}/0", timeout=5)
        assert run(right, [Take(OPENAI, TEN, (1,), 0)])[0].granted
        for secret in ("", ":hunter2@", "me:hunter2@"):
            wrong = RedisStore(f"redis://{secret}127.0.0.1:{guarded.port}/0", timeout=5)
            with pytest.raises(ConfigurationError) as caught:
                run(wrong, [Take(OPENAI, TEN, (1,), 0)])
            assert "hunter2" not in "".join(traceback.format_exception(caught.value))
            assert str(guarded.port) in str(caught.value)
    finally:
        guarded.stop()


def test_a_missing_permission_is_a_matter_of_configuration(
    server: servers.Server, raw: Any, run: Run
) -> None:
    rules = {
        "noscript": ["~*", "+get"],
        "nokeys": ["~else:*", "+@all"],
        "noset": ["~*", "+evalsha", "+eval", "+get", "+time"],
    }
    for name, rule in rules.items():
        raw.execute_command("ACL", "SETUSER", name, "on", ">hunter2", *rule)
        store = RedisStore(f"redis://{name}:hunter2@127.0.0.1:{server.port}", timeout=5)
        with pytest.raises(ConfigurationError) as caught:
            run(store, [Take(OPENAI, TEN, (1,), 0)])
        assert "EVALSHA" in str(caught.value)
        raw.execute_command("ACL", "DELUSER", name)


def test_the_rights_that_are_named_are_enough(server: servers.Server, raw: Any) -> None:
    rights = "+eval +evalsha +get +getrange +set +setrange +pexpire +del +time"
    raw.execute_command("ACL", "SETUSER", "least", "on", ">pw", "~rate_limit:*", *rights.split(" "))
    store = RedisStore(f"redis://least:pw@127.0.0.1:{server.port}", timeout=5)
    both = (*HOURLY, *WINDOW)
    for _ in range(3):
        store.run([Take(OPENAI, both, (1, 1), 0)])
    store.run([Hold(OPENAI, both, 1), Reset(OPENAI, both)])
    store.look(OPENAI)
    raw.execute_command("ACL", "DELUSER", "least")


def test_a_server_that_is_full_is_unavailable(own_server: servers.Server, run: Run) -> None:
    full = servers.start(own_server.kind, "--maxmemory", "1", "--maxmemory-policy", "noeviction")
    try:
        with pytest.raises(StoreUnavailable, match="maxmemory"):
            run(RedisStore(full.url, timeout=5), [Take(OPENAI, TEN, (1,), 0)])
    finally:
        full.stop()


def test_a_missing_redis_py_is_a_matter_of_configuration_with_the_pip_line() -> None:
    code = """
        import sys
        sys.modules["redis"] = None
        from throttle.errors import ConfigurationError
        from throttle.keys import Key
        from throttle.redis import RedisStore
        try:
            RedisStore("redis://localhost").look(Key("a"))
        except ConfigurationError as error:
            print(error)
    """
    assert "pip install 'throttle-toolkit[redis]'" in python(code).stdout


def test_importing_it_and_making_a_store_imports_neither_redis_nor_asyncio() -> None:
    code = """
        import sys
        from throttle.redis import RedisStore
        RedisStore("redis://localhost")
        print({"redis", "asyncio"} & set(sys.modules))
    """
    assert python(code).stdout == "set()\n"


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    lines = code.strip("\n").splitlines()
    indent = len(lines[0]) - len(lines[0].lstrip())
    done = subprocess.run(
        [
            # Not -X dev: asyncio would then tell how long the import of redis-py took.
            *(sys.executable, "-W", "error", "-c"),
            "\n".join(line[indent:] for line in lines),
            *arguments,
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr == ""
    assert done.returncode == 0
    return done


# ---------------------------------------------------------------------------------- the deadline


@contextlib.contextmanager
def listening(serve: Callable[[socket.socket], None]) -> Iterator[int]:
    """Serve every connection in a thread of its own; yield the port."""
    listener = socket.create_server(("127.0.0.1", 0))
    connections: list[socket.socket] = []

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            connections.append(connection)
            threading.Thread(target=attend, args=(connection,), daemon=True).start()

    def attend(connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            serve(connection)

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()
        for connection in connections:
            connection.close()


def blackhole(connection: socket.socket) -> None:
    while connection.recv(65536):
        pass


def trickle(connection: socket.socket) -> None:
    connection.recv(65536)
    for byte in b"*1\r\n$1000\r\n" + b"x" * 1000:
        connection.sendall(bytes([byte]))
        time.sleep(0.05)


def slow_greeting(connection: socket.socket) -> None:
    """Answer AUTH and SELECT each within less than the deadline."""
    for _ in range(10):
        connection.recv(65536)
        time.sleep(0.06)
        connection.sendall(b"+OK\r\n")


def truncated(connection: socket.socket) -> None:
    connection.recv(65536)
    connection.sendall(b"*1\r\n$100\r\nabc")
    connection.close()


def garbage(connection: socket.socket) -> None:
    connection.recv(65536)
    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")


def another_answer(connection: socket.socket) -> None:
    while connection.recv(65536):
        connection.sendall(b"+OK\r\n")


def hang_up(connection: socket.socket) -> None:
    connection.recv(65536)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def assert_unavailable_in_time(run: Run, url: str) -> None:
    store = RedisStore(url)
    took = []
    for _ in range(4):
        begin = time.perf_counter()
        with pytest.raises(StoreUnavailable) as caught:
            run(store, [Take(OPENAI, TEN, (1,), 0)])
        took.append(time.perf_counter() - begin)
        assert not isinstance(caught.value, (KeyUnusable, NoConnectionFree))
        assert "127.0.0.1" in str(caught.value)
        assert "hunter2" not in "".join(traceback.format_exception(caught.value))
    # The first one imports redis-py, and the machine may be busy once.
    assert sorted(took)[2] < 0.110, took
    store.close()


@pytest.mark.parametrize(
    "serve", [blackhole, trickle, slow_greeting, truncated, garbage, another_answer, hang_up]
)
@pytest.mark.parametrize("user", ["", "me:hunter2@"])
def test_whatever_the_server_does_a_call_ends_in_time(
    serve: Callable[[socket.socket], None], run: Run, user: str
) -> None:
    with listening(serve) as port:
        assert_unavailable_in_time(run, f"redis://{user}127.0.0.1:{port}/2")


def test_a_refused_port_is_noticed_at_once(run: Run) -> None:
    assert_unavailable_in_time(run, f"redis://127.0.0.1:{servers.free_port()}")


def test_a_host_that_does_not_even_refuse_is_noticed_in_time(run: Run) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port = listener.getsockname()[1]
        waiting = [socket.socket() for _ in range(3)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(("127.0.0.1", port))
        assert_unavailable_in_time(run, f"redis://127.0.0.1:{port}")
        for one in waiting:
            one.close()


def test_a_server_that_hangs_is_noticed_in_time_and_nothing_is_sent_twice(
    own_server: servers.Server, run: Run
) -> None:
    client = redis.Redis(port=own_server.port)
    client.flushall()
    store = RedisStore(own_server.url)
    blocking(store, [Take(OPENAI, HOURLY, (1,), 0)])
    own_server.pause()
    begin = time.perf_counter()
    with pytest.raises(StoreUnavailable, match="100 ms"):
        run(store, [Take(OPENAI, HOURLY, (1,), 0)])
    assert time.perf_counter() - begin < 0.2
    own_server.resume()
    patient = RedisStore(own_server.url, timeout=5)
    (seen,) = patient.run([Take(OPENAI, HOURLY, (1,), LOOK)])
    # What was sent is carried out when it wakes up: at most once.
    assert 997.9 < seen.levels[0] < 999.1
    assert run(patient, [Take(OPENAI, HOURLY, (1,), 0)])[0].granted
    client.close()


def test_a_restarted_server_costs_no_call(own_server: servers.Server) -> None:
    store = RedisStore(own_server.url, timeout=5)
    for _ in range(3):
        store.run([Take(OPENAI, TEN, (1,), 0)])
        own_server.restart()
        assert store.run([Take(OPENAI, TEN, (1,), 0)])[0].granted

    async def main() -> None:
        for _ in range(3):
            await asyncio.gather(
                *(store.run_async([Take(OPENAI, TEN, (1,), math.inf)]) for _ in range(20))
            )
            await asyncio.to_thread(own_server.restart)
            assert (await store.run_async([Take(OPENAI, TEN, (1,), 0)]))[0].granted

    asyncio.run(main())


def test_a_forgotten_script_is_sent_again(store: RedisStore, raw: Any, run: Run) -> None:
    for _ in range(3):
        raw.script_flush()
        assert run(store, [Take(OPENAI, TEN, (1,), 0)])[0].granted
    assert raw.info("commandstats")["cmdstat_eval"]["calls"] >= 3


# ------------------------------------------------------------------------- threads, loops, forks


def test_three_hundred_threads_share_the_pool_without_an_error(
    server: servers.Server, raw: Any
) -> None:
    store = RedisStore(server.url, timeout=30)
    plenty = (Quota(1e6, 3600),)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(10):
                (decision,) = store.run([Take(OPENAI, plenty, (1,), 0)])
                assert decision.granted
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(300)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    (seen,) = store.run([Take(OPENAI, plenty, (1,), LOOK)])
    assert seen.levels[0] == pytest.approx(1e6 - 3000, abs=3000)
    assert raw.info("clients")["connected_clients"] <= CONNECTIONS + 2
    store.close()


def test_three_hundred_tasks_share_the_pool_without_an_error(
    server: servers.Server, raw: Any
) -> None:
    store = RedisStore(server.url, timeout=30)

    async def main() -> None:
        takes = (store.run_async([Take(OPENAI, TEN, (1,), math.inf)]) for _ in range(300))
        decisions = [reply[0] for reply in await asyncio.gather(*takes)]
        assert len({decision.receipts[0].serial for decision in decisions}) == 300
        assert raw.info("clients")["connected_clients"] <= CONNECTIONS + 2

    asyncio.run(main())


def test_a_pool_that_is_exhausted_says_so_in_time() -> None:
    with listening(blackhole) as port:
        store = RedisStore(f"redis://127.0.0.1:{port}", timeout=0.3)
        failures: list[Exception] = []

        def work() -> None:
            try:
                store.run([Take(OPENAI, TEN, (1,), 0)])
            except Exception as error:
                failures.append(error)

        threads = [threading.Thread(target=work) for _ in range(CONNECTIONS + 20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {type(error) for error in failures} <= {StoreUnavailable, NoConnectionFree}
        assert len(failures) == CONNECTIONS + 20

        async def main() -> None:
            runs = (store.run_async([Take(OPENAI, TEN, (1,), 0)]) for _ in range(CONNECTIONS + 20))
            errors = await asyncio.gather(*runs, return_exceptions=True)
            # Slots come back at the deadline itself: who gets one then is in time for nothing.
            assert {type(error) for error in errors} <= {StoreUnavailable, NoConnectionFree}
            assert type(errors[0]) is StoreUnavailable

        asyncio.run(main())


def test_who_finds_no_connection_free_says_that_and_not_that_the_store_is_down() -> None:
    with listening(blackhole) as port:
        store = RedisStore(f"redis://127.0.0.1:{port}", timeout=2)

        def work() -> None:
            with pytest.raises(StoreUnavailable):
                store.run([Take(OPENAI, TEN, (1,), 0)])

        threads = [threading.Thread(target=work) for _ in range(CONNECTIONS)]
        for thread in threads:
            thread.start()
        time.sleep(0.3)
        store.timeout = 0.1
        with pytest.raises(NoConnectionFree):
            store.run([Take(OPENAI, TEN, (1,), 0)])
        for thread in threads:
            thread.join()

        async def main() -> None:
            store.timeout = 2
            tasks = [
                asyncio.create_task(store.run_async([Take(OPENAI, TEN, (1,), 0)]))
                for _ in range(CONNECTIONS)
            ]
            await asyncio.sleep(0.1)
            store.timeout = 0.1
            with pytest.raises(NoConnectionFree):
                await store.run_async([Take(OPENAI, TEN, (1,), 0)])
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run(main())


def test_one_store_serves_loop_after_loop_and_loops_in_threads(server: servers.Server) -> None:
    store = RedisStore(server.url, timeout=5)
    failures: list[BaseException] = []

    async def main() -> None:
        for _ in range(20):
            await asyncio.gather(
                *(store.run_async([Take(OPENAI, TEN, (1,), math.inf)]) for _ in range(5))
            )

    def work() -> None:
        try:
            asyncio.run(main())
            asyncio.run(main())
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    store.run([Take(OPENAI, TEN, (1,), 0)])
    for thread in threads:
        thread.join()
    assert failures == []
    assert store._connections._pools == {}


def test_a_loop_that_was_closed_by_hand_is_swept_and_its_sockets_are_closed(
    server: servers.Server, raw: Any
) -> None:
    store = RedisStore(server.url, timeout=5)
    for _ in range(5):
        loop = asyncio.new_event_loop()
        loop.run_until_complete(store.run_async([Take(OPENAI, TEN, (1,), 0)]))
        loop.close()
    store.close()
    gc.collect()
    assert store._connections._pools == {}
    end = time.monotonic() + 5
    while raw.info("clients")["connected_clients"] > 1 and time.monotonic() < end:
        time.sleep(0.01)
    assert raw.info("clients")["connected_clients"] == 1


def test_closing_closes_and_the_next_command_opens_again(server: servers.Server, raw: Any) -> None:
    store = RedisStore(server.url, timeout=5)

    def connections() -> int:
        time.sleep(0.05)
        count: int = raw.info("clients")["connected_clients"] - 1
        return count

    async def main() -> None:
        for _ in range(2):
            store.run([Take(OPENAI, TEN, (1,), 0)])
            await store.run_async([Take(OPENAI, TEN, (1,), 0)])
            assert connections() == 2
            await store.aclose()
            assert connections() == 0

    asyncio.run(main())
    store.close()


@pytest.mark.parametrize(
    "end",
    [
        "asyncio.run(main())",
        "asyncio.run(main()); asyncio.run(main())",
        "loop = asyncio.new_event_loop(); loop.run_until_complete(main()); loop.close()",
        "store.run([Take(key, quotas, (1,), 0)])",
        "asyncio.run(cut_short())",
        "asyncio.run(main()); store.close(); del store; gc.collect()",
        "asyncio.run(main_with_own_store())",
        "(thread := threading.Thread(target=asyncio.run, args=(main(),))).start(); thread.join()",
    ],
)
def test_nothing_is_said_at_the_end_of_a_loop_or_of_the_interpreter(
    server: servers.Server, end: str
) -> None:
    code = f"""
        import asyncio, contextlib, gc, sys, threading
        from throttle.keys import Key
        from throttle.quota import Quota
        from throttle.redis import RedisStore
        from throttle.take import Take
        store = RedisStore(sys.argv[1], timeout=5)
        key, quotas = Key("a"), (Quota(10, 1),)
        async def main():
            await asyncio.gather(*(store.run_async([Take(key, quotas, (1,), 0)]) for _ in range(5)))
        async def main_with_own_store():
            own = RedisStore(sys.argv[1], timeout=5)
            await own.run_async([Take(key, quotas, (1,), 0)])
            del own
            gc.collect()
            await asyncio.sleep(0.01)
        async def cut_short():
            tasks = [asyncio.create_task(main()) for _ in range(5)]
            await asyncio.sleep(0.001)
        {end}
        print("done")
    """
    assert python(code, server.url).stdout == "done\n"


def test_cancelled_callers_leave_no_connection_out_of_step(
    server: servers.Server, raw: Any
) -> None:
    store = RedisStore(server.url, timeout=5)
    big = (Quota(1e9, 3600),)
    keys = [Key("cancel", str(number)) for number in range(50)]

    async def one(number: int) -> None:
        # Each key is charged its own cost: an answer meant for another is told by its level.
        (decision,) = await store.run_async([Take(keys[number], big, (number + 1,), 0)])
        taken = 1e9 - decision.levels[0]
        assert taken % (number + 1) == pytest.approx(0, abs=1e-3) or taken < 1e5

    async def main() -> None:
        for turn in range(200):
            tasks = [asyncio.create_task(one(number % 50)) for number in range(10)]
            for _ in range(turn % 8):
                await asyncio.sleep(0)
            for task in tasks[::2]:
                task.cancel()
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                assert result is None or isinstance(result, asyncio.CancelledError)
        # In step: a look at a hold is a number or nothing, a take is a decision.
        (end,) = await store.run_async([Hold(OPENAI, big, 1_000_000)])
        for _ in range(CONNECTIONS):
            looked, (decision,) = await asyncio.gather(
                store.look_async(OPENAI), store.run_async([Take(keys[0], big, (0,), LOOK)])
            )
            assert looked == end
            assert decision.hold == LONG_AGO

    asyncio.run(main())
    store.close()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_has_connections_of_its_own_and_leaves_the_parents_alone(
    server: servers.Server,
) -> None:
    store = RedisStore(server.url, timeout=5)
    store.run([Take(OPENAI, HOURLY, (1,), 0)])

    async def both() -> list[int]:
        await store.run_async([Take(OPENAI, HOURLY, (1,), 0)])
        children = []
        for _ in range(4):
            child = os.fork()
            if child == 0:
                status = 1
                with contextlib.suppress(BaseException):
                    asyncio._set_running_loop(None)
                    assert store._connections._pool is None
                    for _ in range(50):
                        store.run([Take(OPENAI, HOURLY, (1,), 0)])
                    threads = [threading.Thread(target=work) for _ in range(3)]
                    for thread in threads:
                        thread.start()
                    for thread in threads:
                        thread.join()
                    status = 0
                os._exit(status)
            children.append(child)
        for _ in range(50):
            store.run([Take(OPENAI, HOURLY, (1,), 0)])
            await store.run_async([Take(OPENAI, HOURLY, (1,), 0)])
        return children

    def work() -> None:
        asyncio.run(again())

    async def again() -> None:
        for _ in range(10):
            await store.run_async([Take(OPENAI, HOURLY, (1,), 0)])

    children = asyncio.run(both())
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
    taken = 1 + 1 + 100 + 4 * (50 + 30)
    (seen,) = store.run([Take(OPENAI, HOURLY, (1,), LOOK)])
    assert seen.levels[0] == pytest.approx(1000 - taken, abs=3)
    store.close()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_lock_held_at_the_fork_is_free_in_the_child(server: servers.Server) -> None:
    store = RedisStore(server.url, timeout=5)
    with store._connections._lock:
        child = os.fork()
        if child == 0:
            status = 1
            with contextlib.suppress(BaseException):
                status = 0 if store.run([Take(OPENAI, HOURLY, (1,), 0)])[0].granted else 2
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# ------------------------------------------------------------------------------ ways to be told


def test_a_client_is_taken_for_its_settings_only(
    server: servers.Server, raw: Any, run: Run
) -> None:
    sync = redis.Redis(port=server.port, db=3, decode_responses=True, socket_timeout=77)
    other = redis.asyncio.Redis(port=server.port, db=3, decode_responses=True)
    for client in (sync, other):
        store = RedisStore(client, timeout=5)
        assert store.address == f"redis://localhost:{server.port}/3"
        assert run(store, [Take(OPENAI, HOURLY, (1,), 0)])[0].granted
        store.close()
    assert raw.keys() == []
    assert sync.connection_pool.connection_kwargs["socket_timeout"] == 77
    assert sync.connection_pool._available_connections == []
    sync.flushdb()
    sync.close()


def test_a_unix_socket_keeps_the_deadline_too(run: Run, tmp_path: Path) -> None:
    path = str(tmp_path / "redis.sock")
    server = servers.start(servers.kinds()[0], "--unixsocket", path)
    try:
        store = RedisStore(f"unix://{path}")
        server.pause()
        for _ in range(3):
            begin = time.perf_counter()
            with pytest.raises(StoreUnavailable, match="100 ms"):
                run(store, [Take(OPENAI, TEN, (1,), 0)])
            took = time.perf_counter() - begin
        assert took < 0.2
    finally:
        server.stop()


# redis-py 5.0 leaves the socket that was refused to the collector.
@pytest.mark.filterwarnings("ignore:.*socket.socket:pytest.PytestUnraisableExceptionWarning")
def test_a_unix_socket_that_is_not_there_is_noticed_at_once(run: Run, tmp_path: Path) -> None:
    path = str(tmp_path / "none.sock")
    for _ in range(2):  # the first one imports redis-py
        begin = time.perf_counter()
        with pytest.raises(StoreUnavailable, match=re.escape(path)):
            run(RedisStore(f"unix://{path}"), [Take(OPENAI, TEN, (1,), 0)])
    assert time.perf_counter() - begin < 0.1


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a CA of our own (ca.crt), and what it vouches for: localhost.crt and .key."""
    folder = tmp_path_factory.mktemp("certificates")
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl on PATH")
    (folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1")
    key = "-newkey rsa:2048 -nodes -sha256"
    for arguments in (
        f"req -x509 {key} -days 2 -subj /CN=ours -keyout ca.key -out ca.crt",
        f"req {key} -subj /CN=localhost -keyout localhost.key -out localhost.csr",
        "x509 -req -in localhost.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 2 "
        "-extfile names -out localhost.crt",
    ):
        subprocess.run(
            [openssl, *arguments.split()], cwd=folder, check=True, capture_output=True, timeout=60
        )
    return folder


@pytest.fixture(scope="module")
def secure(certificates: Path) -> Iterator[tuple[servers.Server, int]]:
    """A server that speaks TLS as well, and the port for that."""
    port = servers.free_port()
    try:
        server = servers.start(
            "redis",
            *("--tls-port", str(port), "--tls-auth-clients", "no"),
            *("--tls-cert-file", str(certificates / "localhost.crt")),
            *("--tls-key-file", str(certificates / "localhost.key")),
            *("--tls-ca-cert-file", str(certificates / "ca.crt")),
        )
    except RuntimeError:
        pytest.skip("this redis-server was built without TLS")
    yield server, port
    server.stop()


def test_tls_will_do_with_a_ca_in_the_url(
    secure: tuple[servers.Server, int], certificates: Path, run: Run
) -> None:
    told = f"ssl_ca_certs={certificates / 'ca.crt'}"
    for url in (
        f"rediss://127.0.0.1:{secure[1]}/3?{told}",
        f"rediss://localhost:{secure[1]}/3?{told}&ssl_check_hostname=no",
        f"rediss://localhost:{secure[1]}/3?ssl_cert_reqs=none",
    ):
        store = RedisStore(url, timeout=5)
        assert store.address == url.partition("?")[0]
        for _ in range(3):
            assert run(store, [Take(OPENAI, HOURLY, (1,), 0)])[0].granted
        assert run(store, [Take(OPENAI, HOURLY, (1,), LOOK)])[0].levels[0] < 998
        store.close()


def test_who_is_not_vouched_for_is_not_talked_to(
    secure: tuple[servers.Server, int], certificates: Path, run: Run
) -> None:
    for url in (
        f"rediss://:hunter2@127.0.0.1:{secure[1]}",
        # The CA is right, the name is another one's.
        f"rediss://:hunter2@127.0.0.2:{secure[1]}?ssl_ca_certs={certificates / 'ca.crt'}",
    ):
        with pytest.raises(StoreUnavailable) as caught:
            run(RedisStore(url, timeout=5), [Take(OPENAI, HOURLY, (1,), 0)])
        assert "hunter2" not in "".join(traceback.format_exception(caught.value))


def test_tls_keeps_the_deadline_before_and_after_its_handshake(
    certificates: Path, run: Run
) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificates / "localhost.crt", certificates / "localhost.key")

    def secured(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as wrapped:
            trickle(wrapped)

    for serve in (blackhole, trickle, secured):
        with listening(serve) as port:
            url = f"rediss://127.0.0.1:{port}?ssl_ca_certs={certificates / 'ca.crt'}"
            store = RedisStore(url)
            took = []
            for _ in range(4):
                begin = time.perf_counter()
                with pytest.raises(StoreUnavailable):
                    run(store, [Take(OPENAI, TEN, (1,), 0)])
                took.append(time.perf_counter() - begin)
            # redis-py 5.0 sets the timeout before it reads the certificates.
            in_one = hasattr(redis.connection.SSLConnection, "_wrap_socket_with_ssl")
            assert sorted(took)[2] < (0.115 if in_one else 0.150), took
            store.close()
    gc.collect()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_tls_survives_forks_loops_and_closing(
    secure: tuple[servers.Server, int], certificates: Path
) -> None:
    url = f"rediss://127.0.0.1:{secure[1]}?ssl_ca_certs={certificates / 'ca.crt'}"
    store = RedisStore(url, timeout=5)

    async def main() -> int:
        store.run([Take(OPENAI, HOURLY, (1,), 0)])
        await store.run_async([Take(OPENAI, HOURLY, (1,), 0)])
        child = os.fork()
        if child == 0:
            status = 1
            with contextlib.suppress(BaseException):
                asyncio._set_running_loop(None)
                store.run([Take(OPENAI, HOURLY, (1,), 0)])
                status = 0
            os._exit(status)
        await asyncio.sleep(0.2)
        # What the child closed were its own copies.
        store.run([Take(OPENAI, HOURLY, (1,), 0)])
        await store.run_async([Take(OPENAI, HOURLY, (1,), 0)])
        return child

    assert os.waitstatus_to_exitcode(os.waitpid(asyncio.run(main()), 0)[1]) == 0
    loop = asyncio.new_event_loop()
    loop.run_until_complete(store.run_async([Take(OPENAI, HOURLY, (1,), 0)]))
    loop.close()
    store.close()
    gc.collect()


@pytest.mark.parametrize("kind", [KeyUnusable, NoConnectionFree, StoreUnavailable])
def test_its_errors_pickle(kind: type[StoreUnavailable]) -> None:
    copy = pickle.loads(pickle.dumps(kind("redis://localhost:6379/0: why")))
    assert type(copy) is kind
    assert str(copy) == "redis://localhost:6379/0: why"


def test_a_unix_socket_will_do(run: Run, tmp_path: Path) -> None:
    path = str(tmp_path / "redis.sock")
    server = servers.start(servers.kinds()[0], "--unixsocket", path)
    try:
        for told in (f"unix://{path}?db=1", redis.Redis(unix_socket_path=path, db=1)):
            store = RedisStore(told, timeout=5)
            assert run(store, [Take(OPENAI, HOURLY, (1,), 0)])[0].granted
            store.close()
            assert store.address == f"unix://{path}?db=1"
    finally:
        server.stop()


def test_a_fresh_connection_needs_one_round_trip(
    server: servers.Server, raw: Any, run: Run
) -> None:
    raw.config_resetstat()
    store = RedisStore(server.url, timeout=5)
    run(store, [Take(OPENAI, HOURLY, (1,), 0)])
    store.close()
    sent = {name.removeprefix("cmdstat_") for name in raw.info("commandstats")}
    assert not {name for name in sent if name.startswith(("hello", "client", "ping", "select"))}


def test_a_database_that_does_not_exist_is_unavailable(server: servers.Server, run: Run) -> None:
    store = RedisStore(f"redis://127.0.0.1:{server.port}/9999", timeout=5)
    for _ in range(2):
        with pytest.raises(StoreUnavailable, match="out of range"):
            run(store, [Take(OPENAI, HOURLY, (1,), 0)])
