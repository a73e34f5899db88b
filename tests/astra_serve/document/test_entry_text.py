"""Edits of a document's text change one entry and leave every other byte."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from astra_serve.document import desired
from astra_serve.document.entry_text import with_entry
from astra_serve.errors import BadDocument, Conflict

DIGEST = "sha256:" + 64 * "a"
README = """\
# our adapters
adapters:
  - name: sql                  # the `model` of requests
    source: "./sql-lora"       # a folder
    required: true             # /readyz says no until it is served

  # the second team's
  - source: './b'
    name: b   # out of order
    canary: {version: c, weight: 0.1}
# the end
"""


def edited(text: str, name: str, **changes: Any) -> str:
    """Return the text after a change of some keys of an entry; without changes the entry is removed."""
    old = desired.parse(text, "x").get(name)
    new = desired.entry({**(desired.plain(old) if old else {"name": name}), **changes}) if changes else None
    document, found = with_entry(text, "x", name, old, new)
    assert desired.parse(found, "x") == document
    assert document.get(name) == new
    return found


def test_a_value_is_replaced_where_it_stands_and_new_keys_are_added_below() -> None:
    step = {"digest": DIGEST, "source": "./sql-lora", "replaced": "2026-11-27T09:00:00Z"}
    found = edited(README, "sql", source="./v2", digest=DIGEST, previous=[step])
    assert found == README.replace('"./sql-lora" ', '"./v2" ').replace(
        "until it is served\n",
        f"""until it is served
    digest: {DIGEST}
    previous:
    - digest: {DIGEST}
      source: ./sql-lora
      replaced: '2026-11-27T09:00:00Z'
""",
    )


def test_a_key_that_ends_takes_its_lines_and_no_others() -> None:
    assert edited(README, "b", canary=None) == README.replace("    canary: {version: c, weight: 0.1}\n", "")


def test_an_entry_that_is_removed_takes_its_lines_and_no_others() -> None:
    without_b = README.replace(
        "  - source: './b'\n    name: b   # out of order\n    canary: {version: c, weight: 0.1}\n", ""
    )
    assert edited(README, "b") == without_b
    assert edited(without_b, "sql") == "# our adapters\nadapters: []\n\n  # the second team's\n# the end\n"


def test_the_first_key_of_an_entry_can_be_removed() -> None:
    text = "adapters:\n- canary: {version: c, weight: 0.1}\n  name: a\n  source: b # here\n"
    assert edited(text, "a", canary=None) == "adapters:\n- name: a\n  source: b # here\n"


@pytest.mark.parametrize(
    ("text", "added"),
    [
        ("", "adapters:\n  - name: n\n    source: x\n"),
        ("adapters: []\n# none yet", "adapters:\n  - name: n\n    source: x\n# none yet"),
        ("adapters: []  # none yet\n", "adapters:  # none yet\n  - name: n\n    source: x\n"),
        ("adapters: []", "adapters:\n  - name: n\n    source: x\n"),
        ('{"adapters": []}', '{"adapters": [{"name": "n", "source": "x"}]}'),
        (
            '{"adapters":\n [{"name":"q","source":"z"}]\n}\n',
            '{"adapters":\n [{"name":"q","source":"z"}, {"name": "n", "source": "x"}]\n}\n',
        ),
        (
            "adapters:\n-   {name: q, source: z} # c\n",
            "adapters:\n-   {name: q, source: z} # c\n- name: n\n  source: x\n",
        ),
    ],
)
def test_an_entry_is_added_in_the_style_of_the_document_and_leaves_it_as_it_was(text: str, added: str) -> None:
    found = edited(text, "n", source="x")
    assert found == added
    assert desired.parse(edited(found, "n"), "x") == desired.parse(text, "x")


def test_a_name_with_a_namespace_is_found_added_and_edited_as_it_is() -> None:
    text = "adapters:\n- {name: team, source: x}\n- name: team/sql # ours\n  source: y\n"
    assert edited(text, "team/sql", source="z") == text.replace(" y", " z")
    assert edited(text, "sql/team", source="z") == text + "- name: sql/team\n  source: z\n"
    assert edited(text, "team/sql") == "adapters:\n- {name: team, source: x}\n"


def test_json_stays_json() -> None:
    text = '{"adapters": [{"name": "a", "source": "x"}, {"name": "b", "source": "y"}, {"name": "c", "source": "z"}]}'
    assert edited(text, "b", source="w") == text.replace('"y"', '"w"')
    assert edited(text, "a") == '{"adapters": [{"name": "b", "source": "y"}, {"name": "c", "source": "z"}]}'
    assert edited(text, "c") == '{"adapters": [{"name": "a", "source": "x"}, {"name": "b", "source": "y"}]}'


def test_the_line_ends_of_windows_stay() -> None:
    text = README.replace("\n", "\r\n")
    assert edited(text, "sql", pin=True) == text.replace("is served\r\n", "is served\r\n    pin: true\r\n")


def test_steps_as_old_servers_wrote_them_stay_until_the_entry_itself_changes() -> None:
    text = f"adapters:\n- name: a\n  source: x\n  previous: [{DIGEST}]\n- name: b\n  source: y\n"
    assert edited(text, "b", pin=True) == text + "  pin: true\n"
    assert f"previous: [{DIGEST}]" in edited(text, "a", source="z")


def test_an_entry_that_uses_anchors_of_others_is_written_without_them() -> None:
    text = "adapters:\n- &one {name: a, source: x, pin: true}\n- <<: *one\n  name: b\n- name: c\n  source: z\n"
    found = edited(text, "b", source="y")
    assert found == text.replace("- <<: *one\n  name: b\n", "- name: b\n  source: y\n  pin: true\n")


def test_an_entry_whose_anchor_others_use_is_not_edited() -> None:
    text = "adapters:\n- &one {name: a, source: x}\n- <<: *one\n  name: b\n"
    with pytest.raises(BadDocument, match="tied to others by YAML anchors"):
        edited(text, "a", source="y")


def test_an_entry_that_somebody_else_changed_is_a_conflict() -> None:
    old = desired.entry({"name": "sql", "source": "elsewhere"})
    with pytest.raises(Conflict):
        with_entry(README, "x", "sql", old, None)


COMMENTS = st.sampled_from(["", " # plain", "  # it's - a: [trap]", " # ünïcode \U0001f600"])
VALUES = st.sampled_from(["./x", "'quo''ted'", '"dou\\"ble"', "s3://b/k", "hf://o/r@v", "|-\n      ./block", "'a: b'"])
GAPS = st.sampled_from(["", "\n", "# a line\n", "\n  # - name: b\n\n"])


@st.composite
def entries(draw: st.DrawFn, name: str) -> str:
    """Return the lines of an entry in block style."""
    keys = [f"name: {name}{draw(COMMENTS)}", f"source: {draw(VALUES)}"]
    keys[1] += "" if "\n" in keys[1] else draw(COMMENTS)
    keys += draw(st.lists(st.sampled_from([f"digest: {DIGEST}", "pin: true", "required: no # why"]), unique=True))
    keys = draw(st.permutations(keys))
    return "- " + "\n  ".join(keys) + "\n"


@given(st.data())
def test_whatever_the_document_looks_like_only_the_lines_of_one_entry_change(data: st.DataObject) -> None:
    parts = [data.draw(entries(name)) for name in "abc"]
    gaps = [data.draw(GAPS) for _ in range(4)]
    text = gaps[0] + "adapters:\n" + parts[0] + gaps[1] + parts[1] + gaps[2] + parts[2] + gaps[3]
    changes = data.draw(
        st.fixed_dictionaries({}, optional={
            "source": st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20),
            "pin": st.booleans(), "digest": st.sampled_from([None, "sha256:" + 64 * "b"]),
            "canary": st.sampled_from([None, {"version": "v", "weight": 0.5}]),
            "previous": st.just([DIGEST, {"digest": DIGEST, "source": "s"}]),
        })
    )  # fmt: skip
    before, after = gaps[0] + "adapters:\n" + parts[0] + gaps[1], gaps[2] + parts[2] + gaps[3]
    found = edited(text, "b", **changes)
    assert found.startswith(before)
    assert found.endswith(after)
    if not changes:
        assert found == before + after
