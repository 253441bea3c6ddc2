"""The command: `throttle demo`, `limits`, `status` and `reset`; also `python -m throttle`.

Exit codes: 0 fine; 1 the demo's promise did not hold, the store is unavailable, or a reset was
declined; 2 a wrong usage or configuration; 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

import throttle
from throttle.errors import ConfigurationError, ThrottleError, in_seconds
from throttle.keys import printable

if TYPE_CHECKING:
    from throttle.permit import Status
    from throttle.quota import Quota
    from throttle.store import Store

__all__ = ["main"]

PATIENCE = 2.0
"""Seconds a person waits for Redis; the 100 ms of a call on its way are not theirs."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    warnings.showwarning = _show_warning
    try:
        try:
            return _run(arguments)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Who read this has seen enough; nor may the interpreter's own last flush complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except ConfigurationError as error:
        return _complain(error, 2)
    except (ThrottleError, OSError) as error:
        return _complain(error, 1)


def _run(arguments: Sequence[str] | None) -> int:
    options = _parser().parse_args(arguments)
    code: int = options.run(options)
    return code


def _complain(error: Exception, code: int) -> int:
    print(f"throttle: {error}", file=sys.stderr)
    return code


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"throttle: {message}", file=sys.stderr)


# What may be asked.


class _Help(argparse.RawDescriptionHelpFormatter):
    """Examples as they are written, and a column that fits the longest option."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="throttle",
        description="Calls that never go out faster than the provider allows.",
        epilog="""examples:
  throttle demo                            see it work: 25 seconds, nothing needed
  throttle demo --redis redis://localhost:6379/0 --workers 8
  throttle limits                          which limits are in force, and from where
  throttle status openai                   what is left now, over all workers
  throttle status twilio +15550001         of one sender
  throttle reset openai --yes              full again""",
        formatter_class=_Help,
    )
    parser.add_argument("--version", action="version", version=f"throttle {throttle.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    demo = commands.add_parser(
        "demo",
        help="fire the same calls at a provider, undecorated and decorated",
        description="""\
Start a provider on loopback that refuses what is above its limit, and fire the
same calls at it: undecorated, in fail-fast mode and in waiting mode, from
threads and from asyncio. Waiting mode must end without one 429 and with at
least 98 % of the ideal throughput; otherwise the exit code is 1.""",
        epilog="""examples:
  throttle demo
  throttle demo --limit 200 --calls 600 --only waiting
  throttle demo --redis redis://localhost:6379/0 --workers 8""",
        formatter_class=_Help,
    )
    demo.add_argument("--redis", metavar="URL", help="keep the bucket in this Redis (memory)")
    demo.add_argument("--workers", type=_count, default=1, metavar="N", help="processes (1)")
    demo.add_argument("--calls", type=_count, default=100, metavar="N", help="in each mode (100)")
    demo.add_argument("--limit", type=_count, default=50, metavar="N", help="per window (50)")
    demo.add_argument("--window", type=_seconds, default=1.0, metavar="S", help="seconds (1)")
    demo.add_argument("--burst", type=_count, metavar="N", help="at once (a fifth of the limit)")
    demo.add_argument(
        "--only",
        action="append",
        choices=("undecorated", "fail-fast", "waiting"),
        metavar="MODE",
        help="undecorated, fail-fast or waiting; may be repeated (all three)",
    )
    demo.set_defaults(run=_demo)

    limits = commands.add_parser(
        "limits",
        help="print the limits in force, and where each came from",
        description="""\
Print the limits in force and where each came from: built in, changed in code,
or from the file that THROTTLE_LIMITS names; the default for every other name;
and where the buckets live.""",
        epilog="""examples:
  throttle limits
  THROTTLE_LIMITS=limits.toml throttle limits --json""",
        formatter_class=_Help,
    )
    _add_json(limits)
    limits.set_defaults(run=_limits)

    status = commands.add_parser(
        "status",
        help="print what is left of a limit now; takes nothing",
        description="Print what is left of a limit now. Takes nothing from it.",
        epilog="""examples:
  throttle status openai
  throttle status twilio +15550001 --redis redis://localhost:6379/0 --json""",
        formatter_class=_Help,
    )
    _add_bucket(status)
    _add_json(status)
    status.set_defaults(run=_status)

    reset = commands.add_parser(
        "reset",
        help="fill a bucket: the whole burst may go at once again",
        description="""\
Fill a bucket: whatever was used, the whole burst may go at once again, and a
hold ends.""",
        epilog="""examples:
  throttle reset openai
  throttle reset twilio +15550001 --redis redis://localhost:6379/0 --yes""",
        formatter_class=_Help,
    )
    _add_bucket(reset)
    reset.add_argument("--yes", action="store_true", help="do not ask")
    reset.set_defaults(run=_reset)
    return parser


def _add_bucket(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="of the limit, as in API_LIMITS")
    parser.add_argument("key", metavar="KEY", nargs="?", help="the partition (none)")
    parser.add_argument("--redis", metavar="URL", help="where the buckets live (REDIS_URL)")


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")


def _count(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return number


def _seconds(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return number


# What is answered.


def _demo(options: argparse.Namespace) -> int:
    from throttle import demo

    workload = demo.Workload(
        calls=options.calls,
        limit=options.limit,
        window=options.window,
        burst=options.burst or max(1, options.limit // 5),
        workers=options.workers,
        redis_url=options.redis,
        modes=tuple(mode for mode in demo.MODES if mode in (options.only or demo.MODES)),
    )
    if options.redis is None:
        broken = demo.run(workload, sys.stdout, None)
    else:
        with closing(_redis(options.redis)) as store:
            broken = demo.run(workload, sys.stdout, store)
    for promise in broken:
        print(f"throttle: {promise}", file=sys.stderr)
    return 1 if broken else 0


def _limits(options: argparse.Namespace) -> int:
    from throttle.config import describe_store
    from throttle.limits import default_quota, effective

    rows, default, store = effective(), default_quota(), describe_store()
    if options.json:
        limits = [
            {
                "table": table,
                "name": name,
                "quotas": [_quota_fields(quota) for quota in quotas],
                "origin": origin,
            }
            for table, name, quotas, origin in rows
        ]
        print(json.dumps({"limits": limits, "default": _quota_fields(default), "store": store}))
        return 0
    lines = [("table", "name", "quotas", "from")]
    for table, name, quotas, origin in rows:
        lines.append((table, printable(name), ", ".join(map(str, quotas)), origin))
    _print_columns(lines)
    print()
    print(f"any other name: {default}")
    print(f"store: {store}")
    return 0


def _status(options: argparse.Namespace) -> int:
    with closing(_store(options)) as store:
        if store.local:
            print(
                "throttle: no Redis is configured (--redis URL, or REDIS_URL), and the memory of "
                "other processes cannot be seen: this is a fresh bucket of this process",
                file=sys.stderr,
            )
        limiter = throttle.RateLimiter(options.name, store=store)
        status = limiter.peek(key=options.key)
    if options.json:
        said = {"name": options.name, "key": options.key, "store": _described(store)}
        said |= _status_fields(status)
        said["quotas"] = [
            _quota_fields(each.quota) | _status_fields(each) for each in status.quotas
        ]
        print(json.dumps(said))
        return 0
    print(f"{_shown(options)} ({_described(store)})")
    lines = [("quota", "remaining", "retry after", "full after")]
    for each in status.quotas:
        if each.retry_after is None:
            retry_after = "now"
        elif math.isinf(each.retry_after):
            retry_after = "never"
        else:
            retry_after = in_seconds(each.retry_after)
        lines.append(
            (str(each.quota), str(each.remaining), retry_after, in_seconds(each.reset_after))
        )
    _print_columns(lines)
    return 0


def _reset(options: argparse.Namespace) -> int:
    with closing(_store(options)) as store:
        if store.local:
            raise ConfigurationError(
                "no Redis is configured, and the memory of other processes cannot be reached: "
                "give --redis URL, or set REDIS_URL"
            )
        limiter = throttle.RateLimiter(options.name, store=store)
        if not options.yes and sys.stdin.isatty():
            where = f"{_shown(options)} ({_described(store)})"
            answer = input(f"fill {where} for every worker? [y/N] ")
            if answer.strip().lower() not in ("y", "yes"):
                print("nothing was reset")
                return 1
        limiter.reset(key=options.key)
    print(f"{_shown(options)} is full again")
    return 0


def _store(options: argparse.Namespace) -> Store:
    url = options.redis or os.environ.get("REDIS_URL")
    return _redis(url) if url else throttle.MemoryStore()


def _redis(url: str) -> Store:
    # Not the default store of the process: it gives up sooner, and may answer from memory when
    # Redis does not, which is right for a call on its way and wrong for who asks about Redis.
    prefix = os.environ.get("REDIS_PREFIX") or "rate_limit"
    return throttle.RedisStore(url, prefix=prefix, timeout=PATIENCE)


def _described(store: Store) -> str:
    return "memory" if store.local else repr(store)


def _shown(options: argparse.Namespace) -> str:
    name = printable(options.name)
    return name if options.key is None else f"{name}, key {printable(options.key)}"


def _quota_fields(quota: Quota) -> dict[str, Any]:
    return {
        "limit": quota.limit,
        "window": quota.window,
        "burst": quota.burst,
        "unit": quota.unit,
        "algorithm": quota.algorithm,
    }


def _status_fields(status: Status) -> dict[str, Any]:
    """Return the numbers of a status: `retry_after` is 0 for now, and null for never."""
    retry_after = status.retry_after or 0
    return {
        "limit": status.limit,
        "unit": status.unit,
        "remaining": status.remaining,
        "retry_after": None if math.isinf(retry_after) else retry_after,
        "reset_after": status.reset_after,
    }


def _print_columns(lines: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join(cells).rstrip())


if __name__ == "__main__":
    sys.exit(main())
