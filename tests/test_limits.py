"""The tables of limits: edited in place, looked up by name, and what the environment says."""

from __future__ import annotations

import copy
import json
import pickle
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from throttle import (
    API_LIMITS,
    ENDPOINT_LIMITS,
    ConfigurationError,
    Quota,
    RateLimiter,
    configure,
)
from throttle.limits import effective, look_up

BUILT_IN = {
    "API_LIMITS": {
        "openai": {"limit": 3000, "window": 60},
        "twilio": {"limit": 100, "window": 1},
    },
    "ENDPOINT_LIMITS": {
        "webhook/inbound": {"limit": 60, "window": 60},
        "webhook/status": {"limit": 120, "window": 60},
        "user/config": {"limit": 30, "window": 60},
    },
}


@pytest.fixture(autouse=True)
def _as_built_in() -> Any:
    """Each test finds the tables as they come, and leaves them so."""
    with mock.patch.dict(API_LIMITS), mock.patch.dict(ENDPOINT_LIMITS):
        for table in (API_LIMITS, ENDPOINT_LIMITS):
            for name in table:
                table[name] = copy.deepcopy(table[name])
        yield
    configure(unknown=None)


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_the_tables_come_with_these_limits() -> None:
    assert tuple(BUILT_IN.values()) == (API_LIMITS, ENDPOINT_LIMITS)


# Edited in place


EDITS: dict[str, Callable[[], object]] = {
    "set": lambda: API_LIMITS.__setitem__("openai", {"limit": 7, "window": 60}),
    "set a field": lambda: API_LIMITS["openai"].__setitem__("limit", 7),
    "update": lambda: API_LIMITS.update({"openai": {"limit": 7, "window": 60}}),
    "update by keyword": lambda: API_LIMITS.update(openai={"limit": 7, "window": 60}),
    "update from pairs": lambda: API_LIMITS.update([("openai", Quota(7, 60))]),
    "update a field": lambda: API_LIMITS["openai"].update(limit=7),
    "|=": lambda: API_LIMITS.__ior__({"openai": "7/min"}),
    "|= on an entry": lambda: API_LIMITS["openai"].__ior__({"limit": 7}),
    "del and setdefault": lambda: (
        API_LIMITS.__delitem__("openai"),
        API_LIMITS.setdefault("openai", "7/min"),
    ),
    "pop and set": lambda: API_LIMITS.__setitem__(
        "openai", {**API_LIMITS.pop("openai"), "limit": 7}
    ),
    "clear and set": lambda: (API_LIMITS.clear(), API_LIMITS.update(openai="7/min")),
    "popitem and set": lambda: (API_LIMITS.popitem(), API_LIMITS.update(openai="7/min")),
    "clear an entry": lambda: (
        API_LIMITS["openai"].clear(),
        API_LIMITS["openai"].update(limit=7, window=60),
    ),
    "a table of ENDPOINT_LIMITS behind it": lambda: (
        API_LIMITS.pop("openai"),
        ENDPOINT_LIMITS.update(openai="7/min"),
    ),
}


@pytest.mark.filterwarnings("ignore:.* one bucket, and each:UserWarning")
@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_is_seen_at_the_next_call_of_a_limiter_there_is(edit: str) -> None:
    limiter = RateLimiter("openai")
    assert limiter.quotas == (Quota(3000, 60),)
    EDITS[edit]()
    assert limiter.quotas == (Quota(7, 60),)


LIST_EDITS: dict[str, tuple[Callable[[Any], object], tuple[Quota, ...]]] = {
    "append": (lambda entry: entry.append("9/h"), (Quota(5, 60), Quota(9, 3600))),
    "+=": (lambda entry: entry.__iadd__(["9/h"]), (Quota(5, 60), Quota(9, 3600))),
    "extend": (lambda entry: entry.extend(iter(["9/h"])), (Quota(5, 60), Quota(9, 3600))),
    "insert": (lambda entry: entry.insert(0, "9/h"), (Quota(9, 3600), Quota(5, 60))),
    "a field in it": (lambda entry: entry[0].update(limit=6), (Quota(6, 60),)),
    "an item": (lambda entry: entry.__setitem__(0, "9/h"), (Quota(9, 3600),)),
    "a slice": (lambda entry: entry.__setitem__(slice(None), ["9/h"]), (Quota(9, 3600),)),
    "remove": (
        lambda entry: (entry.append("9/h"), entry.remove({"limit": 5, "window": 60})),
        (Quota(9, 3600),),
    ),
    "pop": (lambda entry: (entry.append("9/h"), entry.pop(0)), (Quota(9, 3600),)),
    "del": (lambda entry: (entry.append("9/h"), entry.__delitem__(0)), (Quota(9, 3600),)),
    "reverse": (
        lambda entry: (entry.append("9/h"), entry.reverse()),
        (Quota(9, 3600), Quota(5, 60)),
    ),
    "clear": (lambda entry: (entry.clear(), entry.append("9/h")), (Quota(9, 3600),)),
    "an appended dict, later": (
        lambda entry: (entry.append({"limit": 1, "window": 1}), entry[1].update(limit=2)),
        (Quota(5, 60), Quota(2, 1)),
    ),
}


@pytest.mark.filterwarnings("ignore:.* one bucket, and each:UserWarning")
@pytest.mark.parametrize("edit", LIST_EDITS)
def test_an_edit_within_a_list_is_seen_as_well(edit: str) -> None:
    change, expected = LIST_EDITS[edit]
    API_LIMITS["api"] = [{"limit": 5, "window": 60}]
    limiter = RateLimiter("api")
    assert limiter.quotas == (Quota(5, 60),)
    change(API_LIMITS["api"])
    assert limiter.quotas == expected


@pytest.mark.filterwarnings("ignore:.* one bucket, and each:UserWarning")
def test_monkeypatch_and_patch_dict_are_seen_and_undone() -> None:
    limiter = RateLimiter("openai")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(API_LIMITS, "openai", {"limit": 7, "window": 60})
        assert limiter.quotas == (Quota(7, 60),)
    assert limiter.quotas == (Quota(3000, 60),)
    with mock.patch.dict(API_LIMITS, {"openai": "7/min"}, clear=True):
        assert limiter.quotas == (Quota(7, 60),)
    assert limiter.quotas == (Quota(3000, 60),)
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(API_LIMITS, "openai")
        with pytest.warns(UserWarning, match="'openai' is in neither"):
            assert limiter.quotas == (Quota(60, 60),)
    assert limiter.quotas == (Quota(3000, 60),)


@pytest.mark.filterwarnings("ignore:.* one bucket, and each:UserWarning")
def test_an_edit_by_another_thread_is_never_overlooked() -> None:
    limiter = RateLimiter("openai")

    def edit(name: str) -> None:
        for _ in range(300):
            API_LIMITS[name] = "1/s"
            API_LIMITS.pop(name)

    threads = [threading.Thread(target=edit, args=(f"n{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for number in range(1, 300):
        API_LIMITS["openai"] = Quota(number, 60)
        assert limiter.quotas == (Quota(number, 60),)
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("again", ["the same limiter", "a new limiter"])
def test_an_edit_of_the_table_is_not_two_opinions_of_one_bucket(again: str) -> None:
    limiter = RateLimiter("openai")
    limiter.allow_request()
    API_LIMITS["openai"]["limit"] = 7
    if again == "a new limiter":
        limiter = RateLimiter("openai")
    assert limiter.allow_request()


def test_the_table_keeps_its_own_copy_of_an_entry() -> None:
    mine = {"limit": 5, "window": 60}
    API_LIMITS["api"] = mine
    mine["limit"] = 6
    assert API_LIMITS["api"] == {"limit": 5, "window": 60}


# The tables are dicts


def test_equality_copies_json_and_pickle_are_those_of_a_dict() -> None:
    API_LIMITS["both"] = [{"limit": 5, "window": 60}, "9/h"]
    plain = {**BUILT_IN["API_LIMITS"], "both": [{"limit": 5, "window": 60}, "9/h"]}
    assert isinstance(API_LIMITS, dict)
    assert plain == API_LIMITS
    assert repr(API_LIMITS) == repr(plain)
    assert json.loads(json.dumps(API_LIMITS)) == plain
    for twin in (
        API_LIMITS.copy(),
        copy.copy(API_LIMITS),
        copy.deepcopy(API_LIMITS),
        pickle.loads(pickle.dumps(API_LIMITS)),
        API_LIMITS | {},
        {**API_LIMITS},
    ):
        assert type(twin) is dict
        assert twin == plain
    independent = [copy.deepcopy(API_LIMITS), pickle.loads(pickle.dumps(API_LIMITS))]
    assert [type(twin["both"]) for twin in independent] == [list, list]
    assert [type(twin["openai"]) for twin in independent] == [dict, dict]
    independent[0]["openai"]["limit"] = 1
    assert plain == API_LIMITS
    assert API_LIMITS.pop("nobody", None) is None
    with pytest.raises(KeyError):
        API_LIMITS.pop("nobody")
    with pytest.raises(KeyError):
        API_LIMITS["nobody"]
    with pytest.raises(KeyError):
        del API_LIMITS["nobody"]
    with pytest.raises(TypeError):
        hash(API_LIMITS)


# Forms of an entry, and the order of looking up


@pytest.mark.parametrize(
    ("entry", "quotas"),
    [
        ({"limit": 5, "window": 10}, (Quota(5, 10),)),
        ({"limit": 5}, (Quota(5, 60),)),
        ({"limit": 5, "window": 10, "burst": 2}, (Quota(5, 10, burst=2),)),
        ({"limit": 5, "window": 10, "unit": "tokens"}, (Quota(5, 10, unit="tokens"),)),
        (
            {"limit": 5, "window": 10, "algorithm": "sliding_window"},
            (Quota(5, 10, algorithm="sliding_window"),),
        ),
        (MappingProxyType({"limit": 5}), (Quota(5, 60),)),
        ("5/10 s burst 2", (Quota(5, 10, burst=2),)),
        (Quota(5, 10), (Quota(5, 10),)),
        ([{"limit": 5}, "250 tokens/min"], (Quota(5, 60), Quota(250, 60, unit="tokens"))),
        ((Quota(5, 10), "9/h"), (Quota(5, 10), Quota(9, 3600))),
        (iter(["5/s", "9/h"]), (Quota(5, 1), Quota(9, 3600))),
    ],
)
def test_an_entry_is_a_dict_a_string_a_quota_or_several(
    entry: object, quotas: tuple[Quota, ...]
) -> None:
    API_LIMITS["api"] = entry
    assert look_up("api") == quotas
    assert look_up("api") == quotas


def test_names_are_looked_up_in_this_order() -> None:
    API_LIMITS.update({"a": "1/s", "a:b": "2/s"})
    ENDPOINT_LIMITS.update({"a": "3/s", "a:c": "4/s", "e": "5/s"})
    found = {name: look_up(name) for name in ("a", "a:b", "a:c", "a:d", "a:d:e", "e", "e:f")}
    assert found == {
        "a": (Quota(1, 1),),
        "a:b": (Quota(2, 1),),
        "a:c": (Quota(4, 1),),
        "a:d": (Quota(1, 1),),
        "a:d:e": (Quota(1, 1),),
        "e": (Quota(5, 1),),
        "e:f": (Quota(5, 1),),
    }
    for name in (":a", "b:a"):
        with pytest.warns(UserWarning, match="in neither"):
            assert look_up(name) == (Quota(60, 60),)


def test_an_unknown_name_gets_the_default_and_one_warning_with_the_nearest() -> None:
    limiter = RateLimiter("opnai")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            assert limiter.allow_request()
    assert [str(warning.message) for warning in caught] == [
        "'opnai' is in neither API_LIMITS nor ENDPOINT_LIMITS, so the default of 60 requests/min "
        "applies; did you mean 'openai'?"
    ]
    API_LIMITS["opnai"] = "3/s"
    assert limiter.quotas == (Quota(3, 1),)


def test_an_unknown_name_can_be_made_an_error_and_back() -> None:
    limiter = RateLimiter("twillio")
    configure(unknown="error")
    with pytest.raises(ConfigurationError, match=r"did you mean 'twilio'.*known: openai, twilio"):
        limiter.allow_request()
    configure(unknown="default")
    with pytest.warns(UserWarning, match="did you mean 'twilio'"):
        assert limiter.allow_request()


def test_a_name_of_line_breaks_does_not_break_a_line() -> None:
    name = "x\n\x1b[31mred\u2028" + "y" * 100_000
    with pytest.warns(UserWarning, match="in neither") as caught:
        look_up(name)
    text = str(caught[0].message)
    assert text.isprintable()
    assert len(text) < 300


# Wrong entries


@pytest.mark.parametrize(
    ("entry", "texts"),
    [
        ({"limit": 0, "window": 1}, ["limit", "0", "above 0"]),
        ({"limit": -5, "window": 1}, ["limit", "-5", "above 0"]),
        ({"limit": "5", "window": 1}, ["limit", "'5'", "not a number"]),
        ({"limit": True, "window": 1}, ["limit", "True", "not a number"]),
        ({"limit": float("nan"), "window": 1}, ["limit", "nan", "above 0"]),
        ({"limit": float("inf"), "window": 1}, ["limit", "inf", "at most"]),
        ({"limit": 5, "window": -1}, ["window", "-1", "seconds", "above 0"]),
        ({"limit": 5, "window": 0}, ["window", "0", "above 0"]),
        ({"limit": 5, "window": 1e-9}, ["window", "below one microsecond"]),
        ({"limit": 5, "window": 1, "burst": 0}, ["burst", "0", "above 0"]),
        ({"limit": 5, "window": 1, "unit": "a b"}, ["unit", "'a b'", "letters"]),
        ({"limit": 5, "window": 1, "algorithm": "gcra"}, ["algorithm", "token_bucket"]),
        ({"limit": 5, "windw": 1}, ["windw", "did you mean 'window'", "limit, window, burst"]),
        ({"window": 1}, ["limit", "missing"]),
        ({}, ["limit", "missing"]),
        ({5: 6}, ["unknown field 5"]),
        ([], ["empty list"]),
        (["5/s", {"limit": 0}], ["[1]", "limit", "above 0"]),
        (["5/s", "6/s"], ["same unit, window and algorithm"]),
        ([["5/s"]], ["[0]", "not a quota"]),
        ("5/never", ["5/never", "use s, min, hour or day"]),
        ("", ["''", "3000/minute"]),
        (None, ["None", "not a quota"]),
        (5, ["5", "not a quota"]),
    ],
)
def test_a_wrong_entry_names_the_entry_the_field_and_what_is_allowed(
    entry: object, texts: list[str]
) -> None:
    limiter = RateLimiter("bad")
    API_LIMITS["bad"] = entry
    for ask in (limiter.allow_request, effective):
        with pytest.raises(ConfigurationError) as error:
            ask()
        assert str(error.value).startswith("API_LIMITS['bad']")
        for text in texts:
            assert text in str(error.value)
    assert RateLimiter("openai").allow_request()  # the others are not concerned
    API_LIMITS["bad"] = "5/s"
    assert limiter.allow_request()


def test_a_name_that_is_no_string_concerns_nobody_else() -> None:
    API_LIMITS[5] = "5/s"  # type: ignore[index]
    with pytest.warns(UserWarning, match="in neither"):
        look_up("unknown")
    with pytest.raises(ConfigurationError, match="known: openai"):
        look_up("unknown", unknown="error")
    with pytest.raises(ConfigurationError, match=r"API_LIMITS\[5\]: a name is a string"):
        effective()


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=12)
    | st.binary(max_size=4)
    | st.sampled_from(["5/s", "1 per 10 s", "sliding_window", "tokens", 5, 60, b""])
)
FIELDS = st.sampled_from(["limit", "window", "burst", "unit", "algorithm"]) | SCALARS
ENTRIES = st.recursive(
    SCALARS | st.dictionaries(FIELDS, SCALARS, max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner)
        | st.dictionaries(FIELDS, inner, max_size=4)
        | st.frozensets(SCALARS, max_size=3)
    ),
    max_leaves=6,
)


@given(entry=ENTRIES)
@example(entry={"limit": 5, "window": 1, "algorithm": []})
@example(entry={"limit": 5e-324, "window": 1e7})
@example(entry={"limit": 10**400, "window": 1})
@example(entry="9" * 5000 + "/s")
@settings(
    max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_whatever_stands_in_a_table_is_a_limit_or_a_configuration_error(entry: Any) -> None:
    API_LIMITS["fuzz"] = entry
    try:
        quotas = look_up("fuzz")
    except ConfigurationError as error:
        assert str(error).startswith("API_LIMITS['fuzz']")
    else:
        assert quotas
        assert all(isinstance(quota, Quota) for quota in quotas)


# The environment


def test_the_default_limit_and_window_come_from_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DEFAULT_RATE_LIMIT", "5")
    monkeypatch.setenv("DEFAULT_WINDOW_SECONDS", "2.5")
    API_LIMITS["half"] = {"limit": 9}
    with pytest.warns(UserWarning, match=r"default of 5 requests"):
        assert look_up("unknown") == (Quota(5, 2.5),)
    assert look_up("half") == (Quota(9, 2.5),)
    assert RateLimiter("x", 7).quotas == (Quota(7, 2.5),)
    monkeypatch.setenv("DEFAULT_RATE_LIMIT", " ")
    monkeypatch.setenv("DEFAULT_WINDOW_SECONDS", "")
    with pytest.warns(UserWarning, match=r"default of 60 requests/min"):
        assert look_up("unknown") == (Quota(60, 60),)


@pytest.mark.parametrize("variable", ["DEFAULT_RATE_LIMIT", "DEFAULT_WINDOW_SECONDS"])
@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "1e300", "sixty", "60s", "1e-300"])
def test_a_wrong_number_in_the_environment_names_its_variable(
    monkeypatch: pytest.MonkeyPatch, variable: str, text: str
) -> None:
    monkeypatch.setenv(variable, text)
    with pytest.raises(ConfigurationError, match=f"^{variable}: '{text}' is not a number above 0"):
        look_up("unknown")


TOML = """
[api]
openai = "7/min"
twilio = [{limit = 3, window = 1}, "90/h"]
[api."new:model"]
limit = 5
unit = "tokens"
[endpoints]
"webhook/inbound" = {limit = 9, window = 60, burst = 3}
"""
JSON = json.dumps(
    {
        "api": {
            "openai": "7/min",
            "twilio": [{"limit": 3, "window": 1}, "90/h"],
            "new:model": {"limit": 5, "unit": "tokens"},
        },
        "endpoints": {"webhook/inbound": {"limit": 9, "window": 60, "burst": 3}},
    }
)


@pytest.mark.parametrize(("name", "text"), [("l.toml", TOML), ("l.json", JSON), ("limits", TOML)])
def test_a_file_of_limits_wins_over_code_and_leaves_the_dicts_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, text: str
) -> None:
    path = write(tmp_path / name, text)
    API_LIMITS["openai"] = "1/s"
    API_LIMITS["mine"] = "2/s"
    monkeypatch.setenv("THROTTLE_LIMITS", path)
    assert look_up("openai") == (Quota(7, 60),)
    assert look_up("twilio") == (Quota(3, 1), Quota(90, 3600))
    assert look_up("new:model") == (Quota(5, 60, unit="tokens"),)
    assert look_up("webhook/inbound") == (Quota(9, 60, burst=3),)
    assert look_up("user/config") == (Quota(30, 60),)
    assert look_up("mine") == (Quota(2, 1),)
    assert API_LIMITS == {
        "openai": "1/s",
        "twilio": {"limit": 100, "window": 1},
        "mine": "2/s",
    }
    assert dict(ENDPOINT_LIMITS) == BUILT_IN["ENDPOINT_LIMITS"]
    origins = {(table, name): origin for table, name, _, origin in effective()}
    assert origins == {
        ("API_LIMITS", "mine"): "code",
        ("API_LIMITS", "new:model"): f"THROTTLE_LIMITS ({path})",
        ("API_LIMITS", "openai"): f"THROTTLE_LIMITS ({path})",
        ("API_LIMITS", "twilio"): f"THROTTLE_LIMITS ({path})",
        ("ENDPOINT_LIMITS", "user/config"): "built-in",
        ("ENDPOINT_LIMITS", "webhook/inbound"): f"THROTTLE_LIMITS ({path})",
        ("ENDPOINT_LIMITS", "webhook/status"): "built-in",
    }
    assert [row[:2] for row in effective()] == sorted(origins)
    assert {row[1]: row[2] for row in effective()}["twilio"] == (
        Quota(3, 1),
        Quota(90, 3600),
    )
    write(tmp_path / name, text.replace("7/min", "8888/min"))
    assert look_up("openai") == (Quota(8888, 60),)


def test_without_a_file_the_view_is_that_of_the_tables() -> None:
    API_LIMITS["openai"] = "1/s"
    assert [(table, name, origin) for table, name, _, origin in effective()] == [
        ("API_LIMITS", "openai", "code"),
        ("API_LIMITS", "twilio", "built-in"),
        ("ENDPOINT_LIMITS", "user/config", "built-in"),
        ("ENDPOINT_LIMITS", "webhook/inbound", "built-in"),
        ("ENDPOINT_LIMITS", "webhook/status", "built-in"),
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("l.toml", None, "cannot be read"),
        ("l.toml", "[api", "is not TOML"),
        ("l.json", "{", "is not JSON"),
        ("l.json", "[" * 100_000, "is not JSON"),
        ("l.json", "[]", "the tables are \\[api\\] and \\[endpoints\\]"),
        ("l.json", "null", "the tables are"),
        ("l.toml", "[apis]\n", "'apis' is not a table of limits"),
        ("l.toml", "openai = 5\n", "'openai' is not a table of limits"),
        ("l.toml", "api = 5\n", "'api' is not a table of limits"),
        ("l.toml", "[api.openai]\nlimit = 0\n", "api\\['openai'\\]: limit: 0 is not above 0"),
        ("l.toml", "[api.openai]\nlimt = 9\n", "api\\['openai'\\]: unknown field 'limt'"),
        ("l.toml", "[api]\nopenai = 1979-05-27\n", "api\\['openai'\\]: .* is not a quota"),
        ("l.json", '{"api": {"x": {"limit": NaN}}}', "api\\['x'\\]: limit: nan"),
    ],
)
def test_a_wrong_file_names_itself_the_entry_and_what_is_allowed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, text: str | None, message: str
) -> None:
    path = tmp_path / name
    if text is not None:
        write(path, text)
    monkeypatch.setenv("THROTTLE_LIMITS", str(path))
    with pytest.raises(ConfigurationError, match=f"^THROTTLE_LIMITS: .*{name}.*{message}"):
        RateLimiter("openai").allow_request()


def test_a_file_in_another_encoding_and_a_folder_cannot_be_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "l.toml").write_bytes(b"\xff\xfe")
    for path in (tmp_path / "l.toml", tmp_path):
        monkeypatch.setenv("THROTTLE_LIMITS", str(path))
        with pytest.raises(ConfigurationError, match="cannot be read"):
            look_up("openai")


@given(content=st.binary(max_size=80) | st.text(max_size=80).map(lambda text: text.encode()))
@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@pytest.mark.parametrize("name", ["fuzz.toml", "fuzz.json"])
def test_any_content_of_a_file_is_limits_or_a_configuration_error(
    tmp_path: Path, name: str, content: bytes
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("throttle.limits._read", {})
        patch.setenv("THROTTLE_LIMITS", str(path))
        try:
            look_up("openai")
        except ConfigurationError as error:
            assert "THROTTLE_LIMITS" in str(error)
