"""`astra-serve keys` on real documents: keys are made, shown once, listed and revoked."""

import fcntl
import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from starlette.datastructures import Headers

from astra_serve.cli import main
from astra_serve.document import keys
from astra_serve.document.keys import Keys
from astra_serve.gateway.tenancy.keyring import Keyring

HASHES = [f"sha256:{digit * 64}" for digit in "abc"]
BY_HAND = f"""\
# who may do what; ask operations
tenants:
  - name: "search"          # the team of the search box
    adapters: [sql, 'search/*']
    keys:
      - {{hash: {HASHES[0]}, label: ci}}
    weight: 2   # until spring

  # the second team
  - keys: [{{hash: '{HASHES[1]}', label: laptop}}, {{hash: {HASHES[2]}, label: laptop}}]
    name: billing
    adapters: ["*"]
# the end
"""


class Document:
    """A keys document, and the command line on it."""

    def __init__(self, file: Path, capsys) -> None:
        self.file, self._capsys = file, capsys

    def run(self, command: str, *words: str, status: int = 0) -> str:
        """Run a command, and return its output: of one that fails the one line on stderr."""
        found = main(["keys", command, *words, *([] if command == "schema" else ["--keys", str(self.file)])])
        out, err = self._capsys.readouterr()
        assert found == status, err
        if status:
            assert (out, err.count("\n")) == ("", 1)
            return str(err)
        return str(out)

    @property
    def content(self) -> Keys:
        return keys.parse(self.file.read_text(), "x")


@pytest.fixture
def document(tmp_path: Path, capsys) -> Document:
    return Document(tmp_path / "keys.yaml", capsys)


@pytest.fixture
def by_hand(document: Document) -> Document:
    document.file.write_text(BY_HAND)
    return document


def test_a_new_key_is_all_of_the_output_and_opens_the_tenants_adapters(document: Document) -> None:
    key = document.run("new", "search", "--adapter", "search/*", "--requests-at-a-time", "3", "--base").strip()
    assert key.startswith("astra-")
    assert len(key) == len("astra-") + 43  # 256 bits
    assert key not in document.file.read_text()
    keyring = Keyring([], follows=True)
    keyring.replace(document.content)
    caller = keyring.caller(Headers({"Authorization": f"Bearer {key}"}))
    assert caller
    assert (caller.name, caller.sees("search/a"), caller.sees("a"), caller.may_use_base) == (
        "search",
        True,
        False,
        True,
    )
    assert document.content.tenants[0].limits.requests_at_a_time == 3


def test_a_new_document_is_readable_by_its_owner_alone(document: Document) -> None:
    document.run("new", "search", "--adapter", "*")
    assert stat.S_IMODE(document.file.stat().st_mode) == 0o600
    document.file.chmod(0o640)
    document.run("new", "search")
    assert stat.S_IMODE(document.file.stat().st_mode) == 0o640


def test_no_two_keys_are_equal_and_a_tenant_has_several(document: Document) -> None:
    made = {document.run("new", "search", *words) for words in (("--adapter", "*"), (), ())}
    assert len(made) == len(document.content.tenants[0].keys) == 3


def test_a_tenant_that_is_not_there_needs_an_adapter(document: Document) -> None:
    assert "no tenant 'serach': give --adapter" in document.run("new", "serach", status=2)
    assert not document.file.exists()


def test_settings_of_a_tenant_that_is_there_are_refused(by_hand: Document) -> None:
    assert "change its adapters, rights and limits there" in by_hand.run("new", "search", "--weight", "3", status=2)
    assert by_hand.file.read_text() == BY_HAND


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (("a b", "--adapter", "*"), "name: use up to 64 letters"),
        (("t", "--adapter", "a/b/c"), "adapters.0: an adapter's name or a glob"),
        (("t", "--adapter", "*", "--tokens-per-day", "0"), "limits.tokens_per_day: "),
        (("t", "--adapter", "*", "--weight", "nan"), "weight: "),
        (("t", "--adapter", "*", "--expires", "soon"), "give days as 90d, or a date as 2027-01-01"),
        (("t", "--adapter", "*", "--expires", "2020-01-01"), "is over"),
        (("t", "--adapter", "*", "--expires", "0d"), "give 1d to 36500d"),
        (("t", "--adapter", "*", "--label", "x" * 129), "--label has 129 characters"),
        (
            ("t", "--adapter", "*", "--label", "a\x1b[31m"),
            "a label is one line of characters",
        ),
    ],
)
def test_bad_settings_are_one_line_and_change_nothing(document: Document, words: tuple[str, ...], fault: str) -> None:
    assert fault in document.run("new", *words, status=2)
    assert not document.file.exists()


def test_the_end_of_a_key_is_a_number_of_days_or_a_date_of_utc(document: Document) -> None:
    document.run("new", "t", "--adapter", "*", "--expires", "2099-01-01", "--label", "one")
    document.run("new", "t", "--expires", "90d", "--label", "two")
    one, two = (key.expires for key in document.content.tenants[0].keys)
    assert one and two  # noqa: PT018
    assert one.isoformat() == "2099-01-01T00:00:00+00:00"
    assert abs(two.timestamp() - time.time() - 90 * 86400) < 60


def test_a_document_written_by_hand_keeps_every_byte_but_the_keys_of_the_tenant(by_hand: Document) -> None:
    by_hand.run("new", "search", "--label", "new")
    added = by_hand.content.tenants[0].keys[1].hash
    old = f"      - {{hash: {HASHES[0]}, label: ci}}\n"
    new = f"    - hash: {HASHES[0]}\n      label: ci\n    - hash: {added}\n      label: new\n"
    assert by_hand.file.read_text() == BY_HAND.replace(old, new)


def test_the_first_key_of_a_tenant_and_the_last_one_leave_the_rest_as_it_was(document: Document) -> None:
    text = "tenants:\n- adapters: [a]   # one\n  name: t\n# the end\n"
    document.file.write_text(text)
    document.run("new", "t", "--label", "ci")
    document.run("revoke", "t", "ci")
    assert document.file.read_text() == text


def test_a_key_is_revoked_by_its_label_or_the_first_digits_of_its_hash(by_hand: Document) -> None:
    assert by_hand.run("revoke", "search", "ci") == "revoked aaaaaaaaaaaa ci\n"
    assert by_hand.run("revoke", "billing", "sha256:bbbb") == "revoked bbbbbbbbbbbb laptop\n"
    assert by_hand.run("revoke", "billing", "cccc") == "revoked cccccccccccc laptop\n"
    assert [tenant.keys for tenant in by_hand.content.tenants] == [[], []]
    assert "# the second team" in by_hand.file.read_text()


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (
            ("billing", "laptop"),
            "'laptop' is more than one key of 'billing'; give digits of one: bbbbbbbbbbbb laptop, cc",
        ),
        (("billing", "ci"), "'billing' has no key 'ci'; there are: bbbbbbbbbbbb laptop, cc"),
        (("billing", "bbb"), "'billing' has no key 'bbb'"),
        (("nobody", "ci"), "no tenant 'nobody'; there are: search, billing"),
        (("billing",), "Give its label or the first digits of its hash, or --all"),
        (("billing", "bbbb", "--all"), "Give its label or the first digits of its hash, or --all"),
    ],
)
def test_a_key_that_is_not_exactly_one_is_refused(by_hand: Document, words: tuple[str, ...], fault: str) -> None:
    assert fault in by_hand.run("revoke", *words, status=2)
    assert by_hand.file.read_text() == BY_HAND


def test_a_key_itself_as_an_argument_is_not_repeated(by_hand: Document) -> None:
    secret = "astra-" + "k" * 43
    assert secret not in by_hand.run("revoke", "search", secret, status=2)


def test_all_keys_of_a_tenant_are_revoked_and_no_others(by_hand: Document) -> None:
    by_hand.run("revoke", "billing", "--all")
    assert [len(tenant.keys) for tenant in by_hand.content.tenants] == [1, 0]


def test_revoke_before_new_is_refused(document: Document) -> None:
    assert "no tenant 'search'; there are: none" in document.run("revoke", "search", "ci", status=2)
    assert not document.file.exists()


def test_keys_made_at_the_same_time_are_all_in_the_document(by_hand: Document) -> None:
    with ThreadPoolExecutor(6) as pool:
        found = pool.map(
            lambda n: main(["keys", "new", "search", "--label", f"k{n}", "--keys", str(by_hand.file)]), range(6)
        )
    assert [*found] == [0] * 6
    assert {key.label for key in by_hand.content.tenants[0].keys} == {"ci", *(f"k{n}" for n in range(6))}


def test_list_shows_labels_ends_and_limits_and_no_whole_hash(by_hand: Document, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    text = BY_HAND.replace("label: ci", "label: ci, expires: 2020-01-01T00:00:00Z")
    by_hand.file.write_text(text.replace("weight: 2", "limits: {requests_per_minute: 6000}"))
    table = by_hand.run("list")
    for shown in ("search/*", "6,000 requests per minute", "aaaaaaaaaaaa", "ci", "expired", "laptop", "never"):
        assert shown in table
    assert "a" * 13 not in table
    (described,) = json.loads(by_hand.run("list", "search", "--json"))
    assert (described["keys"][0]["expired"], described["limits"]["requests_per_minute"]) == (True, 6000)


def test_a_document_with_a_fault_is_neither_listed_nor_changed(document: Document) -> None:
    document.file.write_text("tenants: [{nam: x}]")
    for words in (("list",), ("new", "x", "--adapter", "*"), ("revoke", "x", "--all")):
        assert "tenants.0" in document.run(*words, status=1)
    assert document.file.read_text() == "tenants: [{nam: x}]"


def test_the_environment_names_the_document(by_hand: Document, monkeypatch, capsys) -> None:
    monkeypatch.delenv("ASTRA_KEYS", raising=False)
    assert main(["keys", "list"]) == 2
    assert "give --keys" in capsys.readouterr().err.lower()
    monkeypatch.setenv("ASTRA_KEYS", str(by_hand.file))
    assert main(["keys", "list"]) == 0


@pytest.mark.parametrize("where", ["https://x/keys.yaml", "nosuch://x/keys.yaml"])
def test_a_document_that_cannot_be_written_is_one_line(where: str, capsys) -> None:
    assert main(["keys", "new", "t", "--adapter", "*", "--keys", where]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)


def test_the_schema_describes_a_tenant(document: Document) -> None:
    assert "adapters" in json.loads(document.run("schema"))["$defs"]["Tenant"]["properties"]


def started(file: Path, stdout: int) -> "subprocess.Popen[str]":
    command = [
        sys.executable,
        "-c",
        "import sys; from astra_serve.cli import main; sys.exit(main())",
        "keys",
        "new",
        "search",
    ]
    return subprocess.Popen([*command, "--keys", str(file)], stdout=stdout, stderr=subprocess.PIPE, text=True)


def until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.01)


def test_ctrl_c_while_another_process_writes_changes_nothing(by_hand: Document) -> None:
    folder = by_hand.file.parent
    held = os.open(folder, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    process = started(by_hand.file, subprocess.PIPE)
    until(lambda: folder in [fd.resolve() for fd in Path(f"/proc/{process.pid}/fd").iterdir() if fd.exists()])
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    os.close(held)
    assert (process.returncode, out, err.count("\n")) == (130, "", 1)
    assert (by_hand.file.read_text(), [*folder.iterdir()]) == (BY_HAND, [by_hand.file])


def test_a_key_that_cannot_be_printed_is_said_with_the_command_that_revokes_it(by_hand: Document) -> None:
    with Path("/dev/full").open("w") as full:
        process = started(by_hand.file, full.fileno())
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err.count("\n")) == (1, 1)
    *_, tenant, digits = err.split()
    by_hand.run("revoke", tenant, digits)
    assert len(by_hand.content.tenants[0].keys) == 1
