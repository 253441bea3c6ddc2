"""The package as a whole: what importing it costs, its twins, its arrows, and what is built."""

from __future__ import annotations

import ast
import difflib
import inspect
import os
import shutil
import subprocess
import sys
import tarfile
import textwrap
import venv
import zipfile
from collections.abc import Iterator
from email import message_from_string
from email.message import Message
from pathlib import Path

import pytest

import throttle

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "throttle"
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))


def run(*command: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done


# Importing it

HEAVY = (
    *("redis", "openai", "twilio", "tenacity", "httpx", "httpx2", "requests", "starlette"),
    *("asyncio", "pytest", "hypothesis", "freezegun", "ssl", "socket", "multiprocessing"),
)

IMPORTED = """
import sys
import throttle
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


def test_importing_it_pulls_in_nothing_heavy() -> None:
    loaded = run(sys.executable, "-W", "error", "-c", IMPORTED).stdout.split()
    assert "throttle" in loaded
    assert [name for name in HEAVY if name in loaded] == []


READ = """
import os, sys

read = []

class Recorder(dict):
    def __getitem__(self, name): read.append(name); return super().__getitem__(name)
    def get(self, name, default=None): read.append(name); return super().get(name, default)
    def __contains__(self, name): read.append(name); return super().__contains__(name)
    def __iter__(self): read.append("*"); return super().__iter__()
    def keys(self): read.append("*"); return super().keys()
    def items(self): read.append("*"); return super().items()
    def copy(self): read.append("*"); return super().copy()

os.environ = Recorder(os.environ)
os.getenv = os.environ.get
import throttle
print(*read)
throttle.RateLimiter("openai").allow_request()
print(*read)
"""


def test_importing_it_reads_no_variable_of_ours() -> None:
    at_import, after = run(sys.executable, "-c", READ).stdout.splitlines()
    ours = {
        *("REDIS_URL", "REDIS_PREFIX", "DEFAULT_RATE_LIMIT", "DEFAULT_WINDOW_SECONDS"),
        *("THROTTLE_LIMITS", "*"),
    }
    assert ours.isdisjoint(at_import.split())
    assert {"REDIS_URL", "THROTTLE_LIMITS"} <= set(after.split())


def test_importing_it_takes_little_time(record_property: pytest.RecordProperty) -> None:
    program = (
        "import time; t = time.perf_counter(); import throttle; print(time.perf_counter() - t)"
    )
    seconds = min(float(run(sys.executable, "-c", program).stdout) for _ in range(5))
    record_property("import_seconds", seconds)
    assert seconds < 2  # the figure is reported; this only tells a disaster


# Twins

TWIN_MODULES = (
    "limiter",
    "permit",
    "store",
    "redis",
    "connections",
    "transport",
    "waiters",
    "config",
)
RENAMED = {"aclose": "close", "__aenter__": "__enter__", "__aexit__": "__exit__"}
RENAMED |= {"__anext__": "__next__", "__aiter__": "__iter__"}

ALLOWED: dict[str, tuple[str, set[str] | None]] = {
    "limiter.RateLimiter.acquire": (
        "only a blocking wait can stop the running event loop",
        {"-    _warn_of_blocking()"},
    ),
    "waiters.wait": (
        "a cancellation must not cut the store off, and its loop may be gone",
        {
            "+    import asyncio",
            "-    sleeper = ThreadSleeper()",
            "+    sleeper = TaskSleeper(asyncio.get_running_loop())",
            "-                _carry(queue, commands)",
            "+                _send(queue, commands)",
            "-    except BaseException:",
            "+    except BaseException as reason:",
            "+        if isinstance(reason, GeneratorExit) and (not store.local):",
            "+            raise",
            "-            _carry(queue, commands)",
            "+            if (sending := _send(queue, commands)) is not None:",
            "+                asyncio.shield(sending)",
        },
    ),
    "waiters.ask": ("a local store needs no task; a cancelled ask is shielded, given back", None),
    "waiters.give": ("a local store needs no task; a cancelled correction is shielded", None),
    "store.MemoryStore.run": (
        "arithmetic: the async one is the other",
        {"+    return self.run(commands)"},
    ),
    "store.MemoryStore.look": (
        "arithmetic: the async one is the other",
        {"+    return self.look(key)"},
    ),
    "redis.RedisStore.close": ("closes the running loop's pool as well", None),
    "connections.Connections.ask": (
        "the loop's own pool, and the loop's clock",
        {
            "+    import asyncio",
            "+    loop = asyncio.get_running_loop()",
            "-    deadline = time.monotonic() + timeout",
            "+    deadline = loop.time() + timeout",
            "-    pool = self._pool or self._open()",
            "+    pool = self._pools.get(loop) or self._open(loop)",
        },
    ),
    "connections.Connections._open": ("one pool for all threads, one for each event loop", None),
    "connections.Connections.close": ("each closes its own pool", None),
    "connections.Pool.ask": (
        "a thread's deadline is kept by its socket, a task's by its loop",
        {
            "+    import asyncio",
            "-        connection.deadline = deadline",
            "-        answer = self._carry(connection, query, warm)",
            "+        with asyncio.timeout_at(deadline):",
            "+            answer = self._carry(connection, query, warm)",
        },
    ),
    "connections.Pool._wait": ("semaphores of threads and of tasks", None),
    "transport._connection_class": ("only sockets need a deadline of their own", None),
}
"""Of each pair that differs why it does, and the lines that may (None: they are two by nature)."""


class Plain(ast.NodeTransformer):
    """Makes of an async function what its blocking twin should be."""

    def visit(self, node: ast.AST) -> ast.AST:
        node = super().visit(node)
        for field in ("name", "id", "attr", "arg"):
            name = getattr(node, field, None)
            if isinstance(name, str):
                setattr(node, field, RENAMED.get(name, name.replace("_async", "")))
        if isinstance(node, ast.Await):
            return node.value
        for asynchronous, blocking in (
            (ast.AsyncFunctionDef, ast.FunctionDef),
            (ast.AsyncFor, ast.For),
            (ast.AsyncWith, ast.With),
        ):
            if isinstance(node, asynchronous):
                fields = {field: getattr(node, field) for field in node._fields}
                return ast.copy_location(blocking(**fields), node)
        if isinstance(node, ast.comprehension):
            node.is_async = 0
        return node


def functions(tree: ast.AST, path: str) -> Iterator[tuple[str, ast.FunctionDef]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            yield from functions(node, f"{path}.{node.name}")
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield f"{path}.{node.name}", node  # type: ignore[misc]


def code_of(function: ast.FunctionDef) -> list[str]:
    """Return the lines of a function, without its docstring and layout."""
    if ast.get_docstring(function):
        function.body = function.body[1:]
    return ast.unparse(function).splitlines()


def twins() -> dict[str, tuple[ast.FunctionDef, ast.FunctionDef]]:
    pairs = {}
    for module in TWIN_MODULES:
        tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
        found = dict(functions(tree, module))
        for path, function in found.items():
            owner, _, name = path.rpartition(".")
            plain = RENAMED.get(name, name.removesuffix("_async"))
            if plain != name and f"{owner}.{plain}" in found:
                pairs[f"{owner}.{plain}"] = found[f"{owner}.{plain}"], function
    return pairs


def difference(pair: tuple[ast.FunctionDef, ast.FunctionDef]) -> list[str]:
    blocking, asynchronous = pair
    twin = Plain().visit(asynchronous)
    lines = difflib.unified_diff(code_of(blocking), code_of(twin), lineterm="", n=0)
    return [line for line in lines if not line.startswith(("---", "+++", "@@"))]


def test_twins_differ_in_nothing_but_what_is_listed() -> None:
    pairs = twins()
    assert len(pairs) > 20
    differing = {path: lines for path, pair in pairs.items() if (lines := difference(pair))}
    unlisted = {}
    for path, lines in differing.items():
        _, allowed = ALLOWED.get(path, ("", set()))
        if allowed is not None and path.startswith("store.MemoryStore"):
            lines = [line for line in lines if line.startswith("+")]
        if allowed is not None and not set(lines) <= allowed:
            unlisted[path] = lines
    assert not unlisted, "\n\n".join("\n".join([path, *unlisted[path]]) for path in unlisted)
    assert set(ALLOWED) <= set(differing), "what is alike by now comes off the list"


def test_the_twin_test_sees_a_twin_that_drifted() -> None:
    text = """
    def ask(self):
        return self.store.run(1)
    async def ask_async(self):
        return await self.store.run_async(2)
    """
    blocking, asynchronous = ast.parse(textwrap.dedent(text)).body
    assert difference((blocking, asynchronous)) == [  # type: ignore[arg-type]
        "-    return self.store.run(1)",
        "+    return self.store.run(2)",
    ]


def test_every_async_method_of_the_interface_has_its_blocking_twin() -> None:
    for owner in (throttle.RateLimiter, throttle.RedisRateLimiter, throttle.Permit):
        for name, method in inspect.getmembers(owner, inspect.iscoroutinefunction):
            plain = RENAMED.get(name, name.removesuffix("_async"))
            assert plain != name, f"{owner.__name__}.{name} is async and is not called so"
            twin = inspect.signature(getattr(owner, plain)).parameters
            assert list(twin) == list(inspect.signature(method).parameters)


# The interface


def test_every_public_name_has_a_promise_of_one_sentence() -> None:
    assert len(throttle.__all__) == len(set(throttle.__all__))
    for name in throttle.__all__:
        public = getattr(throttle, name)
        if isinstance(public, dict):
            continue  # the tables: their docstring stands beside them, in limits.py
        _promises(name, public)
        if inspect.isclass(public):
            for attribute, value in vars(public).items():
                if not attribute.startswith("_") and (
                    inspect.isfunction(value) or isinstance(value, (property, classmethod))
                ):
                    _promises(f"{name}.{attribute}", value)


def _promises(name: str, public: object) -> None:
    docstring = inspect.getdoc(public)
    assert docstring, f"{name} has no docstring"
    first = docstring.split("\n")[0]
    assert first.endswith("."), f"{name}: {first!r} does not end as a sentence"
    assert not docstring.startswith(f"{name.rpartition('.')[2]}("), f"{name} has a generated one"


def test_every_module_says_what_it_does() -> None:
    for module in MODULES:
        docstring = ast.get_docstring(ast.parse((PACKAGE / f"{module}.py").read_text()))
        assert docstring, f"{module} has no docstring"
        assert docstring.split("\n")[0].endswith("."), module


# Arrows

LAYERS = (
    {"keys", "clock"},
    {"errors"},
    {"quota"},
    {"bucket"},
    {"window"},
    {"take"},
    {"events"},
    {"store"},
    {"transport", "limits", "queue"},
    {"connections", "waiters"},
    {"redis"},
    {"config", "permit"},
    {"limiter", "testing"},
    {"decorator", "pytest_plugin"},
    {"__init__"},
    {"provider"},
    {"demo"},
    {"__main__"},
)
LEVEL = {module: level for level, modules in enumerate(LAYERS) for module in modules}


def imports(module: str) -> set[str]:
    """Return what a module imports, at any depth, but under TYPE_CHECKING."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: the core imports absolutely"
            source = node.module or ""
            names.add(source)
            names.update(f"{source}.{alias.name}" for alias in node.names)
    return names


@pytest.mark.parametrize("module", MODULES)
def test_arrows_point_one_way(module: str) -> None:
    assert module in LEVEL, f"{module}: say in LAYERS where it stands"
    for name in imports(module):
        package, _, rest = name.partition(".")
        assert package != "integrations"
        assert not name.startswith("throttle.integrations"), f"{module} imports {name}"
        target = rest.partition(".")[0]
        if package == "throttle" and target in LEVEL:
            assert LEVEL[target] < LEVEL[module], f"{module} imports throttle.{target}"


# What is built


def python_of(environment: Path) -> str:
    folder = environment / ("Scripts" if os.name == "nt" else "bin")
    return str(folder / "python")


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A wheel and an sdist, built from a copy, so that the checkout stays clean."""
    folder = tmp_path_factory.mktemp("build")
    source = folder / "source"
    shutil.copytree(
        ROOT,
        source,
        ignore=shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__"),
    )
    if not (source / "README.md").exists():
        (source / "README.md").write_text("To come.\n")
    isolated = folder / "venv"
    venv.create(isolated, with_pip=True)
    python = python_of(isolated)
    try:
        run(python, "-m", "pip", "install", "-q", "setuptools>=77", cwd=folder)
    except AssertionError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"no package index to get setuptools from: {error}")
    for verb in ("build_sdist", "build_wheel"):
        program = f"from setuptools import build_meta; build_meta.{verb}({str(folder)!r})"
        run(python, "-c", program, cwd=source)
    return next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))


@pytest.fixture(scope="session")
def metadata(built: tuple[Path, Path]) -> Message:
    with zipfile.ZipFile(built[0]) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        return message_from_string(wheel.read(name).decode())


def required(metadata: Message, extra: str) -> set[str]:
    """Return the distributions that an extra brings, through extras of our own too."""
    from packaging.requirements import Requirement

    found: set[str] = set()
    for line in metadata.get_all("Requires-Dist") or []:
        requirement = Requirement(line)
        if requirement.marker is None or not requirement.marker.evaluate({"extra": extra}):
            continue
        if requirement.name == metadata["Name"]:
            found.update(*(required(metadata, name) for name in requirement.extras))
        else:
            found.add(requirement.name)
    return found


def test_the_wheel_needs_nothing_and_its_extras_bring_what_they_say(metadata: Message) -> None:
    assert metadata["Name"] == "throttle-toolkit"
    assert metadata["Version"] == throttle.__version__
    assert metadata["Requires-Python"] == ">=3.11"
    assert required(metadata, "") == set()
    assert required(metadata, "all") >= {"redis", "tenacity", "openai", "twilio"}
    assert required(metadata, "test") >= {"pytest", "freezegun", "redis"}
    for extra in ("redis", "openai", "twilio", "tenacity"):
        assert extra in required(metadata, extra)


def test_the_wheel_contains_the_script_the_types_and_the_integrations(
    built: tuple[Path, Path],
) -> None:
    with zipfile.ZipFile(built[0]) as wheel:
        names = set(wheel.namelist())
        entry_points = next(name for name in names if name.endswith("entry_points.txt"))
        declared = wheel.read(entry_points).decode()
    assert {
        *("throttle/__init__.py", "throttle/take.lua", "throttle/py.typed"),
        "throttle/integrations/__init__.py",
    } <= names
    assert {name.partition("/")[0] for name in names} == {
        "throttle",
        f"throttle_toolkit-{throttle.__version__}.dist-info",
    }
    assert {f"throttle/{module}.py" for module in MODULES} <= names
    assert "throttle = throttle.__main__:main" in declared
    assert "throttle = throttle.pytest_plugin" in declared


def test_the_sdist_contains_the_tests(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[1]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"tests/conftest.py", "tests/test_package.py", "tests/servers.py"} <= names
    assert {"throttle/take.lua", "integrations/__init__.py", "pyproject.toml"} <= names


FIND = """
import importlib.util, throttle, throttle.integrations
assert importlib.util.find_spec("integrations") is None, "the bare name is taken"
print(throttle.integrations.__file__)
print(throttle.RateLimiter("api", 1, 1).allow_request())
"""


@pytest.mark.parametrize("how", ["wheel", "sdist", "editable"])
def test_installed_it_finds_its_integrations(
    built: tuple[Path, Path], tmp_path: Path, how: str
) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = python_of(tmp_path / "venv")
    source = built[0].parent / "source"
    what = {"wheel": [str(built[0])], "sdist": [str(built[1])], "editable": ["-e", str(source)]}
    run(python, "-m", "pip", "install", "-q", *what[how], cwd=tmp_path)
    found = run(python, "-W", "error", "-c", FIND, cwd=tmp_path).stdout.splitlines()
    assert found[0].endswith("integrations/__init__.py")
    assert found[1] == "True"


def test_a_bare_checkout_finds_its_integrations() -> None:
    program = textwrap.dedent(
        """
        import tests.conftest, throttle.integrations
        print(throttle.integrations.__file__)
        """
    )
    found = run(sys.executable, "-c", program).stdout.strip()
    assert Path(found) == ROOT / "integrations" / "__init__.py"
