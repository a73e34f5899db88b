"""The keys document: what it allows, and its faults in one line each."""

import fnmatch
import json
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from astra_serve.document import keys
from astra_serve.document.keys import Tenant, expired, hash_of
from astra_serve.errors import BadDocument

HASH = "sha256:" + "a" * 64
PART = st.text("aAb.-", min_size=1, max_size=5)
GLOB_PART = st.text("aAb.-*?", min_size=1, max_size=5)


def tenant(**content: object) -> Tenant:
    return keys.parse(f"tenants: [{ {'name': 't', **content} }]", "x").tenants[0]


def test_a_tenant_without_settings_may_use_nothing_and_has_no_limits() -> None:
    found = tenant()
    assert (found.base, found.pinned_versions, found.usage, found.metrics, found.may_use("a")) == (False,) * 5
    assert set(found.limits.model_dump(exclude={"default_max_tokens"}).values()) == {None}
    assert (found.weight, found.limits.default_max_tokens) == (1.0, 1024)


@pytest.mark.parametrize(
    ("glob", "yes", "no"),
    [
        ("sql", ["sql"], ["SQL", "sqlx", "a/sql", "sql/a"]),
        ("*", ["sql", "a.b"], ["a/b"]),
        ("team/*", ["team/a"], ["team", "teams/a", "Team/a"]),
        ("*/a", ["team/a"], ["a", "team/b"]),
        ("s?l", ["sql", "s.l"], ["sl", "sqql", "s/l"]),
        ("a.b", ["a.b"], ["axb"]),
    ],
)
def test_a_glob_is_of_the_whole_name_and_does_not_cross_the_slash(glob: str, yes: list[str], no: list[str]) -> None:
    found = tenant(adapters=["other", glob])
    assert [*map(found.may_use, yes)] == [True] * len(yes)
    assert [*map(found.may_use, no)] == [False] * len(no)


@given(st.lists(GLOB_PART, min_size=1, max_size=2), st.lists(PART, min_size=1, max_size=2))
def test_a_glob_matches_part_by_part_what_a_shell_matches(glob: list[str], name: list[str]) -> None:
    found = Tenant.model_construct(name="t", adapters=["/".join(glob)])
    matches = len(glob) == len(name) and all(map(fnmatch.fnmatchcase, name, glob))
    assert found.may_use("/".join(name)) == matches


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "x has no 'tenants': write 'tenants: []' to let nobody in"),
        ("{}", "x has no 'tenants': write 'tenants: []' to let nobody in"),
        ("tenants: [", "x is not YAML at line "),
        ("tenants: 3", "x: tenants: Input should be a valid list"),
        ("tenant: []", "x: tenant: no such key; did you mean 'tenants'?"),
        ("tenants: [3]", "x: tenants.0: Input should be a valid dictionary"),
        ("tenants: [{name: t, wieght: 2}]", "x: tenants.0.wieght: no such key; did you mean 'weight'?"),
        ("tenants: [{name: _all}]", "x: tenants.0.name: use up to 64 letters"),
        ("tenants: [{name: t, weight: 0}]", "x: tenants.0.weight: "),
        ("tenants: [{name: t, weight: .inf}]", "x: tenants.0.weight: "),
        ("tenants: [{name: t, adapters: [a/b/c]}]", "x: tenants.0.adapters.0: an adapter's name or a glob"),
        ("tenants: [{name: t, limits: {requests: 1}}]", "x: tenants.0.limits.requests: no such key; did you mean "),
        ("tenants: [{name: t, keys: [{hash: astra-plain}]}]", "x: tenants.0.keys.0.hash: a hash is sha256: and 64"),
        (f"tenants: [{{name: t, keys: [{{hash: '{HASH}', key: k}}]}}]", "x: tenants.0.keys.0.key: no such key; "),
        (
            f"tenants: [{{name: t, keys: [{{hash: '{HASH}', expires: 2027-01-01T00:00:00}}]}}]",
            "x: tenants.0.keys.0.expires: Input should have timezone info",
        ),
        ("tenants: [{name: t}, {name: t}]", "x: two tenants are named 't'"),
        (
            f"tenants: [{{name: t, keys: [{{hash: '{HASH}'}}]}}, {{name: u, keys: [{{hash: '{HASH}'}}]}}]",
            "x: 't' and 'u' have the same key sha256:aaaaaaaaaaaa...",
        ),
    ],
)
def test_a_fault_is_one_line_that_says_where_it_is(text: str, fault: str) -> None:
    with pytest.raises(BadDocument) as raised:
        keys.parse(text, "x")
    assert str(raised.value).startswith(fault)
    assert "\n" not in str(raised.value)


def test_a_plain_key_in_the_place_of_a_hash_is_not_repeated() -> None:
    with pytest.raises(BadDocument) as raised:
        keys.parse("tenants: [{name: t, keys: [{hash: astra-secret}]}]", "x")
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("char", ["\x1b", "\n", "\x9b", "\u2028", "\u202e"])
def test_a_label_which_is_printed_has_no_character_that_moves_the_cursor_or_turns_the_text(char: str) -> None:
    assert tenant(keys=[{"hash": HASH, "label": "ci: Zoë's laptop, 笔记本"}]).keys[0].label
    with pytest.raises(BadDocument, match=r"tenants\.0\.keys\.0\.label: a label is one line") as raised:
        keys.parse(json.dumps({"tenants": [{"name": "t", "keys": [{"hash": HASH, "label": f"a{char}b"}]}]}), "x")
    assert str(raised.value).isprintable()


def test_a_key_ends_at_its_time() -> None:
    found = tenant(keys=[{"hash": HASH, "expires": "2027-03-01T00:00:00+01:00"}, {"hash": hash_of("b")}])
    end = datetime(2027, 2, 28, 23, tzinfo=UTC)
    assert [expired(found.keys[0], now) for now in (end - timedelta(seconds=1), end)] == [False, True]
    assert not expired(found.keys[1], datetime.max.replace(tzinfo=UTC))
