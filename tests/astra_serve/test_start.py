"""Options of `astra-serve`."""

from argparse import Namespace

import pytest

from astra_serve import start
from astra_serve.environment import admin_token, policy_token
from astra_serve.errors import ServeError
from astra_serve.gateway.tenancy.quota.redis_store import RedisStore
from astra_serve.start import base_as_served


@pytest.mark.parametrize(("text", "size"), [("1", 1), ("8MiB", 8 * 2**20), ("64KiB", 2**16), ("1GiB", 2**30)])
def test_a_size_is_given_in_bytes_or_with_its_unit(text: str, size: int) -> None:
    args, _ = start._parser().parse_known_args(["--base", "x", "--max-body", text])
    assert args.max_body == size


@pytest.mark.parametrize("text", ["0", "-1", "8MB", "8 MiB", "1.5MiB", "much", ""])
def test_another_size_is_one_line_with_an_example(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        start._parser().parse_args(["--base", "x", f"--max-body={text}"])
    assert "a size such as 8MiB" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--upload-to", "/shared"], "give --admin-port"),
        (["--upload-to", "/shared", "--admin-port", "1", "--adapters", "s3://b/a.yaml"], "s3://b/a.yaml is only read"),
        (["--upload-to", "https://h/x", "--admin-port", "1", "--adapters", "a.yaml"], "such as s3://bucket/prefix"),
        (
            ["--upload-to", "/shared", "--admin-port", "1", "--adapters", "a.yaml", "--adapter-root", "/adapters"],
            "--upload-to /shared is outside of --adapter-root",
        ),
    ],
)
def test_uploads_that_no_server_could_fetch_are_refused_at_the_start(words, message: str, monkeypatch) -> None:
    monkeypatch.setenv("ASTRA_ADMIN_TOKEN", "token")
    with pytest.raises(ServeError, match=message):
        start._check(start._parser().parse_args(["--base", "x", *words]))


def test_a_target_in_one_of_the_roots_is_accepted(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("ASTRA_ADMIN_TOKEN", "token")
    words = ["--upload-to", str(tmp_path / "up"), "--adapter-root", str(tmp_path), "--admin-port", "1"]
    args = start._parser().parse_args(["--base", "x", *words, "--adapters", "a.yaml"])
    start._check(args)
    target = start._upload_target(args)
    assert target is not None
    assert target.folder == tmp_path / "up"


def test_with_another_template_for_the_base_an_adapters_is_never_taken_for_the_bases(base) -> None:
    given = {"chat_template": None, "tokenizer": None, "model": "m", "max_lora_rank": 64}
    for settings, known in (({}, True), ({"chat_template": "x.jinja"}, False), ({"tokenizer": "other"}, False)):
        served = base_as_served(base, Namespace(**{**given, **settings}), 8)
        assert (served.tokenizer.template is not None, served.max_rank) == (known, 64)
    assert base_as_served(base, Namespace(**given), 0) == base


@pytest.mark.parametrize("token", ["ASTRA_POLICY_TOKEN", "ASTRA_ADMIN_TOKEN"])
def test_a_policy_port_needs_a_token_and_a_folder(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ASTRA_POLICY_TOKEN", "ASTRA_ADMIN_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    complete = ["--base", "x", "--policy-port", "1", "--adapter-root", "out"]
    for words, value in ((complete, ""), (complete, " "), (complete[:-2], "secret")):
        monkeypatch.setenv(token, value)
        with pytest.raises(ServeError, match="--policy-port needs a token in ASTRA_POLICY_TOKEN"):
            start._check(start._parser().parse_args(words))
    monkeypatch.setenv(token, "secret")
    start._check(start._parser().parse_args(complete))


def test_the_policy_port_has_a_token_of_its_own_before_that_of_the_admin_port(monkeypatch) -> None:
    monkeypatch.setenv("ASTRA_ADMIN_TOKEN", "admin")
    monkeypatch.setenv("ASTRA_POLICY_TOKEN", "policy\n")
    assert (policy_token(), admin_token()) == ("policy", "admin")
    monkeypatch.delenv("ASTRA_POLICY_TOKEN")
    assert policy_token() == "admin"


def store_of(*words: str) -> RedisStore | None:
    return start._limits_store(start._parser().parse_args(["--base", "x", *words]), "base")


def test_limits_are_counted_in_memory_unless_an_address_is_given(monkeypatch) -> None:
    monkeypatch.delenv("ASTRA_LIMITS_STORE", raising=False)
    assert store_of() is None
    assert store_of("--limits-store", "redis://host:1/0") is not None
    monkeypatch.setenv("ASTRA_LIMITS_STORE", "redis://:password@host:1/0\n")  # of a Secret made of a file
    assert store_of() is not None
    assert store_of("--limits-store", "memory") is None


def test_an_address_of_limits_that_is_none_is_refused_at_the_start_without_its_password(monkeypatch) -> None:
    monkeypatch.setenv("ASTRA_LIMITS_STORE", "http://:hidden@host/0")
    with pytest.raises(ServeError, match="--limits-store is no address of Redis") as refused:
        start._check(start._parser().parse_args(["--base", "x"]))
    assert "hidden" not in str(refused.value)
