"""Quotas: every form of them, and an error that says what to do for every wrong one."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from throttle.errors import ConfigurationError
from throttle.quota import LONGEST_WINDOW, Quota, parse_quota, parse_quotas

WRITTEN = {
    "3000/minute": Quota(3000, 60),
    "3000/min": Quota(3000, 60),
    "3000 / m": Quota(3000, 60),
    "3_000 per minute": Quota(3000, 60),
    " 100/s burst 10 ": Quota(100, 1, burst=10),
    "100/sec": Quota(100, 1),
    "10/day": Quota(10, 86_400),
    "10 requests/d": Quota(10, 86_400),
    "5/hr": Quota(5, 3600),
    "5 per 10 s": Quota(5, 10),
    "5/10s": Quota(5, 10),
    "1/0.5 s": Quota(1, 0.5),
    "0.5/s": Quota(0.5, 1),
    "250000 tokens/min": Quota(250_000, 60, unit="tokens"),
    "60 audio-seconds/hours": Quota(60, 3600, unit="audio-seconds"),
    "100/min sliding_window": Quota(100, 60, algorithm="sliding_window"),
    "100/MIN sliding window": Quota(100, 60, algorithm="sliding_window"),
    "100/min burst 5 token_bucket": Quota(100, 60, burst=5),
}


@pytest.mark.parametrize(("text", "quota"), WRITTEN.items(), ids=WRITTEN)
def test_a_quota_is_written_as_people_write_it(text: str, quota: Quota) -> None:
    assert Quota.parse(text) == quota


@pytest.mark.parametrize(
    "text",
    ["", "3000", "/min", "3000/", "3000/fortnight", "-3/s", "1e3/s", "3 /s/s", "3000 per", "٣/s"]
    + ["0/s", "3/0 s", "3/s burst 0", "3/s burst", "3/min sliding_window burst 2", "nan/s", "inf/s"]
    + ["3/400 days", "1__0.5.5/s", "3 to kens/s", "9" * 400 + "/s", "3/s\n\n3/s", "3;/s"],
)
def test_a_text_that_is_no_quota_is_a_configuration_error_that_shows_it(text: str) -> None:
    with pytest.raises(ConfigurationError):
        Quota.parse(text)


@pytest.mark.parametrize("text", [None, 3, 3.0, b"3/s", ["3/s"], Quota(3, 1)])
def test_parse_takes_a_text_and_nothing_else(text: Any) -> None:
    with pytest.raises(ConfigurationError, match="is not a quota: write LIMIT"):
        Quota.parse(text)


@given(
    st.text(max_size=60) | st.from_regex(r"[\d_.]{1,9} ?[a-z]{0,6} ?(/|per) ?[\d.]{0,4}[a-z]*.*")
)
def test_any_text_is_a_quota_or_a_configuration_error(text: str) -> None:
    try:
        assert isinstance(Quota.parse(text), Quota)
    except ConfigurationError as error:
        assert str(error)


amounts = st.integers(1, 10**9) | st.floats(0.001, 1e6).map(lambda number: float(f"{number:.6g}"))
windows = st.sampled_from([1, 60, 3600, 86_400, 10, 0.25, 604_800, 31_536_000])
units = st.from_regex(r"[A-Za-z][A-Za-z0-9_-]{0,31}", fullmatch=True).filter(
    lambda unit: unit not in ("per", "burst")
)


@given(amounts, windows, st.none() | amounts, units, st.booleans())
def test_what_a_quota_says_of_itself_is_read_back_as_the_same(
    limit: float, window: float, burst: float | None, unit: str, strict: bool
) -> None:
    if strict:
        quota = Quota(limit, window, unit=unit, algorithm="sliding_window")
    else:
        quota = Quota(limit, window, burst, unit=unit)  # type: ignore[arg-type]
    assert Quota.parse(str(quota)) == quota


SAID = {
    Quota(3000, 60): "3000 requests/min",
    Quota(100, 1, burst=10): "100 requests/s burst 10",
    Quota(250_000, 60, unit="tokens"): "250000 tokens/min",
    Quota(5, 10): "5 requests/10 s",
    Quota(10, 86_400, algorithm="sliding_window"): "10 requests/day sliding_window",
    Quota(0.5, 3600): "0.5 requests/hour",
}


@pytest.mark.parametrize(("quota", "text"), SAID.items(), ids=SAID.values())
def test_a_quota_says_what_it_is(quota: Quota, text: str) -> None:
    assert str(quota) == text


@pytest.mark.parametrize(
    ("limit", "burst"), [(10, 10), (1, 1), (0.5, 1), (1e-6, 1), (1.5, 1.5), (1e15, 1e15)]
)
def test_the_burst_is_the_limit_and_at_least_one(limit: float, burst: float) -> None:
    assert Quota(limit, 60).burst == burst
    assert Quota(limit, 60, burst=None).burst == burst  # type: ignore[arg-type]


NOT_NUMBERS: list[Any] = [True, False, "10", b"1", [1], {}, 1j]
WRONG_NUMBERS: list[Any] = [0, -1, 0.0, -0.5, math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("field", ["limit", "window", "burst"])
@pytest.mark.parametrize(
    "value", [*NOT_NUMBERS, *WRONG_NUMBERS, 10**400], ids=lambda v: repr(v)[:9]
)
def test_a_wrong_number_is_refused_by_the_name_of_its_field(field: str, value: Any) -> None:
    fields: dict[str, Any] = {"limit": 10, "window": 60, field: value}
    with pytest.raises(ConfigurationError) as caught:
        Quota(**fields)
    assert str(caught.value).startswith(f"{field}: ")
    assert (
        "is not a number" if value in NOT_NUMBERS[2:] or isinstance(value, bool) else "above 0"
    ) in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"limit": None}, "limit: None is not a number"),
        ({"window": None}, "window: None is not a number"),
        ({"window": LONGEST_WINDOW + 1}, "window: .* at most 31622400 seconds"),
        ({"window": 1e-7}, "window: .* below one microsecond"),
        ({"limit": 1e16}, "limit: .* at most 1e\\+15"),
        ({"limit": 5e-324, "window": 3600}, "limit: .* too small to count"),
        ({"unit": ""}, "unit: '' is not a word of letters"),
        ({"unit": "two words"}, "unit: 'two words' is not a word"),
        ({"unit": "a" * 33}, "unit: .*at most 32"),
        ({"unit": "x{}"}, "unit: "),
        ({"unit": None}, "unit: None"),
        ({"algorithm": "leaky"}, "algorithm: 'leaky' is not one of token_bucket, sliding_window"),
        ({"algorithm": None}, "algorithm: None"),
        ({"algorithm": ["token_bucket"]}, "algorithm: "),
        ({"algorithm": "sliding_window", "burst": 5}, "burst: a sliding_window takes none"),
        ({"algorithm": "sliding_window", "burst": math.nan}, "burst: a sliding_window takes none"),
    ],
    ids=str,
)
def test_a_wrong_field_is_refused_with_what_is_allowed(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=f"^{message}"):
        Quota(**{"limit": 10, "window": 60, **fields})


class TestAsAValue:
    quota = Quota(10, 60, burst=5, unit="tokens")

    def test_equal_quotas_are_equal_and_hash_alike(self) -> None:
        same = Quota(10.0, 60.0, burst=5.0, unit="tokens")
        assert same == self.quota
        assert hash(same) == hash(self.quota)

    @pytest.mark.parametrize(
        ("field", "value"), [("limit", 11), ("window", 61), ("burst", 6), ("unit", "t")]
    )
    def test_one_other_field_is_another_quota(self, field: str, value: Any) -> None:
        assert dataclasses.replace(self.quota, **{field: value}) != self.quota

    def test_the_algorithm_tells_quotas_apart(self) -> None:
        assert Quota(10, 60) != Quota(10, 60, algorithm="sliding_window")

    @pytest.mark.parametrize("quota", SAID, ids=SAID.values())
    def test_it_survives_pickle_and_copy(self, quota: Quota) -> None:
        for again in (pickle.loads(pickle.dumps(quota)), copy.copy(quota), copy.deepcopy(quota)):
            assert again == quota
            assert (again.rate, again.window_us, again.identity) == (
                quota.rate,
                quota.window_us,
                quota.identity,
            )

    @pytest.mark.parametrize("field", ["limit", "burst", "unit", "rate", "identity"])
    def test_it_cannot_be_changed(self, field: str) -> None:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(self.quota, field, 1)

    def test_the_bucket_is_told_by_unit_window_and_algorithm(self) -> None:
        assert Quota(10, 60).identity == Quota(20, 60, burst=3).identity
        others = (Quota(10, 61), Quota(10, 60, unit="tokens"))
        strict = Quota(10, 60, algorithm="sliding_window")
        assert len({quota.identity for quota in (Quota(10, 60), strict, *others)}) == 4


class TestEntries:
    """What stands in a table: one quota in any form, or several."""

    @pytest.mark.parametrize(
        "entry",
        [
            Quota(60, 60),
            "60/min",
            {"limit": 60, "window": 60},
            {"limit": 60, "window": 60, "burst": 60},
        ],
        ids=str,
    )
    def test_every_form_is_the_same_quota(self, entry: Any) -> None:
        assert parse_quota(entry) == Quota(60, 60)
        assert (
            parse_quotas(entry, where="x") == parse_quotas([entry], where="x") == (Quota(60, 60),)
        )

    def test_a_missing_window_is_the_default_when_there_is_one(self) -> None:
        assert parse_quota({"limit": 60}, default_window=30) == Quota(60, 30)

    @pytest.mark.parametrize(
        ("entry", "message"),
        [
            ({"limit": 0, "window": 60}, "openai: limit: 0 is not above 0"),
            ({"limit": 60, "window": -1}, "openai: window: -1 seconds is not above 0"),
            ({"limit": 60}, "openai: window: missing"),
            ({"window": 60}, "openai: limit: missing"),
            (
                {"limit": 60, "windw": 60},
                r"openai: unknown field 'windw' \(did you mean 'window'\?\)",
            ),
            ({"limit": 60, 3: 60}, "openai: unknown field 3; the fields are limit, window, burst"),
            (["60/min", {"limit": True, "window": 1}], r"openai\[1\]: limit: True is not a number"),
            (["60/min", "30/min"], "openai: .* have the same unit, window and algorithm; keep one"),
            (["60/min", 3], r"openai\[1\]: 3 is not a quota"),
            ([], "openai: an empty list"),
            (None, "openai: None is not a quota"),
            (60, "openai: 60 is not a quota"),
            ("60 a minute", "openai: '60 a minute' is not a quota: write LIMIT"),
            ("60/week", "openai: '60/week': 'week' is not a period; use s, min, hour or day"),
        ],
        ids=str,
    )
    def test_a_wrong_entry_is_named_with_its_field(self, entry: Any, message: str) -> None:
        with pytest.raises(ConfigurationError, match=f"^{message}"):
            parse_quotas(entry, where="openai")

    @given(
        st.recursive(
            st.none() | st.booleans() | st.floats() | st.text(max_size=9) | st.binary(max_size=3),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(["limit", "window", "burst", "unit", "algorithm"]), inner
                )
            ),
            max_leaves=8,
        )
    )
    def test_any_entry_is_quotas_or_a_configuration_error(self, entry: Any) -> None:
        try:
            assert parse_quotas(entry, where="openai")
        except ConfigurationError as error:
            assert str(error).startswith("openai")
