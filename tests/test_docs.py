"""Every example in the documentation runs, every link leads somewhere, every table is true.

A page's Python blocks run in order in one namespace, each in virtual time of its own. An HTML
comment before a block says otherwise: `redis` (real time, a real server), or `not run:` and why.
One before a table says what it lists: `options: NAME`, or `environment`.
"""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import throttle
from tests.servers import Server
from throttle import RateLimiter
from throttle.limits import effective
from throttle.testing import recorded, unlimited, virtual_time

ROOT = Path(__file__).parents[1]
PAGES = {
    page.relative_to(ROOT).as_posix(): page
    for page in [*ROOT.glob("*.md"), *sorted((ROOT / "docs").glob("*.md"))]
}
BLOCK = re.compile(r"(?:<!--\s*(?P<note>.*?)\s*-->\n)?```(?P<language>\w*)\n(?P<code>.*?)```", re.S)
TABLE = re.compile(r"<!--\s*(?P<note>options: \w+|environment)\s*-->\n(?P<rows>(?:\|.*\n)+)")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
REDIS = "redis://localhost:6379/0"
MARKED = ("redis", "not run", "limits file")


class Block(NamedTuple):
    language: str
    code: str
    note: str
    line: int


def blocks(text: str) -> list[Block]:
    return [
        Block(
            found["language"],
            found["code"],
            found["note"] or "",
            text.count("\n", 0, found.start("code")),
        )
        for found in BLOCK.finditer(text)
    ]


def tables(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yield what each marked table lists, and the names in its first column."""
    for found in TABLE.finditer(text):
        rows = found["rows"].splitlines()[2:]
        names = [name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])]
        yield found["note"], names


def with_blocks(**wanted: str) -> list[str]:
    def has(block: Block) -> bool:
        return all(getattr(block, name).startswith(start) for name, start in wanted.items())

    return [name for name, page in PAGES.items() if any(map(has, blocks(page.read_text("utf-8"))))]


@pytest.fixture(autouse=True)
def _tables_as_they_were() -> Iterator[None]:
    """An example may edit the tables; the next begins with what is built in."""
    before = [json.dumps(table) for table in (throttle.API_LIMITS, throttle.ENDPOINT_LIMITS)]
    yield
    throttle.configure(unknown=None, max_keys=None)
    for table, text in zip((throttle.API_LIMITS, throttle.ENDPOINT_LIMITS), before, strict=True):
        table.clear()
        table.update(json.loads(text))


def run_page(name: str, tmp_path: Path, redis_url: str | None) -> None:
    namespace: dict[str, Any] = {"__name__": "example"}
    for block in blocks(PAGES[name].read_text("utf-8")):
        if block.language != "python" or block.note.startswith("not run"):
            continue
        if block.note.startswith("redis"):
            if redis_url is not None:
                run_block(
                    name, block._replace(code=block.code.replace(REDIS, redis_url)), namespace
                )
            continue
        if "def test_" in block.code:
            run_as_tests(block.code, tmp_path)
        with virtual_time():
            run_block(name, block, namespace)


def run_block(name: str, block: Block, namespace: dict[str, Any]) -> None:
    # So many lines before it that a traceback shows the line of the page.
    exec(compile("\n" * block.line + block.code, name, "exec"), namespace)


def run_as_tests(code: str, tmp_path: Path) -> None:
    """Run a block that defines tests as a user would: pytest finds the fixtures by itself."""
    (tmp_path / "test_example.py").write_text(code, encoding="utf-8")
    (tmp_path / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
    installed = any(point.name == "throttle" for point in entry_points(group="pytest11"))
    plugin = [] if installed else ["-p", "throttle.pytest_plugin"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *plugin, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


# The examples


@pytest.mark.parametrize("name", with_blocks(language="python"))
def test_every_example_runs(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_page(name, tmp_path, None)


@pytest.mark.parametrize("name", with_blocks(language="python", note="redis"))
def test_every_example_for_redis_runs(
    name: str, tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    run_page(name, tmp_path, server.url)


def test_the_first_example_takes_the_time_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    first = next(block for block in blocks(PAGES["README.md"].read_text("utf-8")))
    with virtual_time() as clock:
        run_block("README.md", first, {})
        assert clock.now() == pytest.approx(1)
    assert len(capsys.readouterr().out.splitlines()) == 12


def test_the_example_of_the_context_managers_holds() -> None:
    page = PAGES["docs/testing.md"].read_text("utf-8")
    (block,) = [block for block in blocks(page) if block.note.startswith("not run")]
    namespace = {
        "RateLimiter": RateLimiter,
        "recorded": recorded,
        "unlimited": unlimited,
        "virtual_time": virtual_time,
    }
    run_block("docs/testing.md", block, namespace)


def test_the_file_of_limits_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = PAGES["docs/configuration.md"].read_text("utf-8")
    (block,) = [block for block in blocks(page) if block.note == "limits file"]
    path = tmp_path / "limits.toml"
    path.write_text(block.code, encoding="utf-8")
    monkeypatch.setenv("THROTTLE_LIMITS", str(path))
    origins = {name: origin for _, name, _, origin in effective()}
    for name in ("openai", "twilio", "openai:gpt-x", "maps", "webhook/inbound"):
        assert origins[name].startswith("THROTTLE_LIMITS")


def test_every_mark_is_known() -> None:
    for name, page in PAGES.items():
        for block in blocks(page.read_text("utf-8")):
            assert not block.note or block.note.startswith((*MARKED, "options")), (name, block.note)


def test_an_example_that_fails_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nwent = 1\n```\n\n```python\nassert went == 2\n```\n", "utf-8")
    monkeypatch.setitem(PAGES, "page.md", page)
    with pytest.raises(AssertionError) as failed:
        run_page("page.md", tmp_path, None)
    assert failed.traceback[-1].lineno == 5  # counted from 0: the sixth line of the page


# The links and the commands


@pytest.mark.parametrize("name", PAGES)
def test_every_link_within_the_project_leads_somewhere(name: str) -> None:
    page = PAGES[name]
    for target in LINK.findall(re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.S)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", there.read_text("utf-8"), re.M)
            known = [re.sub(r"[^\w\- ]", "", text).lower().replace(" ", "-") for text in headings]
            assert anchor in known, f"{name}: {target}"


def test_the_two_commands_are_the_first_that_ci_runs() -> None:
    readme = [b.code.strip() for b in blocks(PAGES["README.md"].read_text("utf-8"))]
    commands = [code for code in readme if code.startswith("pip install")]
    assert len(commands) == 2
    script = (ROOT / ".ci" / "run").read_text("utf-8")
    assert re.findall(r'^run \w+ "(.*)"$', script, re.M)[:2] == commands


# The tables


LISTED: dict[str, Callable[..., object]] = {
    "rate_limited": throttle.rate_limited,
    "configure": throttle.configure,
    "RateLimiter": throttle.RateLimiter,
    "RedisRateLimiter": throttle.RedisRateLimiter,
    "RedisStore": throttle.RedisStore,
}


def listed() -> list[tuple[str, str, list[str]]]:
    return [
        (name, note, names)
        for name, page in PAGES.items()
        for note, names in tables(page.read_text("utf-8"))
    ]


@pytest.mark.parametrize(("page", "note", "names"), listed())
def test_every_table_lists_what_there_is(page: str, note: str, names: list[str]) -> None:
    if note == "environment":
        package = Path(throttle.__file__).parent
        code = "".join(path.read_text("utf-8") for path in package.glob("*.py"))
        read = re.findall(r'environ(?:\.get\(|\[)"(\w+)"|_from_environment\("(\w+)"', code)
        known = {name for pair in read for name in pair if name}
    else:
        known = set(inspect.signature(LISTED[note.removeprefix("options: ")]).parameters)
    assert set(names) == known


def test_the_tables_are_found() -> None:
    notes = {note for _, note, _ in listed()}
    assert notes == {"environment", *(f"options: {name}" for name in LISTED)}
