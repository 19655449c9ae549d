from __future__ import annotations

import io
from pathlib import Path

import jwt
import pytest

import asgi_realtime
from asgi_realtime.cli import terminal
from asgi_realtime.tokens import TokenAuthority
from tests.cli.command import Command
from tests.inprocess import SECRET, FakeClock

AUTHORITY = TokenAuthority(SECRET)


def test_stdout_has_the_new_token_and_nothing_else(command: Command) -> None:
    done = command(
        "token", "--read", "runs:run_1", "--read", "tags:user:1", "--write", "inputStreams:run_1", "--skip", "payload"
    )
    claims = AUTHORITY.verify(done.out.removesuffix("\n"))
    assert claims.scopes == ("read:runs:run_1", "read:tags:user:1", "write:inputStreams:run_1")
    assert claims.skip_columns == ("payload",)
    assert (done.code, done.err) == (0, "")


def test_a_one_time_token_and_its_expiry(command: Command) -> None:
    token = command("token", "--trigger", "tasks:chat", "--one-time", "--expires-in", "1h").out.strip()
    assert AUTHORITY.verify(token).one_time
    assert "expires:     " in (explained := command("token", "--explain", token)).out
    assert "valid for:   one trigger request" in explained.out


def test_the_owner_of_a_token(command: Command) -> None:
    token = command("token", "--read", "runs:run_1", "--owner", "user:1").out.strip()
    assert AUTHORITY.verify(token).owner == "user:1"
    assert "owner:       user:1\n" in command("token", "--explain", token).out


def test_the_tags_that_a_token_allows(command: Command) -> None:
    token = command("token", "--trigger", "tasks:chat", "--tag", "user:1", "--tag", "vip").out.strip()
    assert AUTHORITY.verify(token).tags == ("user:1", "vip")
    assert "run tags:    only user:1, vip\n" in command("token", "--explain", token).out


def test_a_token_that_allows_no_tags(command: Command) -> None:
    token = AUTHORITY.mint(["trigger:tasks:chat"], expires_in_s=60, tags=[])
    assert "run tags:    none\n" in command("token", "--explain", token).out


def test_a_tag_that_is_not_allowed(command: Command) -> None:
    assert "a tag is empty" in command("token", "--trigger", "tasks:chat", "--tag", "").err


def test_the_secret_key_can_be_in_a_file(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REALTIME_SECRET_KEY")
    path = tmp_path / "secret"
    path.write_text(f"{SECRET}\n")
    token = command("token", "--read", "runs:run_1", "--secret-key-file", str(path)).out.strip()
    assert AUTHORITY.verify(token).scopes == ("read:runs:run_1",)
    done = command("token", "--read", "runs:run_1", "--secret-key-file", str(tmp_path / "none"))
    assert done.code == 2 and "cannot read the secret key" in done.err


def test_a_valid_token_is_explained(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    token = AUTHORITY.mint(["read:runs:run_1"], expires_in_s=900)
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{token}\n"))
    done = command("token", "--explain", "-")
    assert done.code == 0
    assert "grants:      read:runs:run_1\n" in done.out
    assert done.out.endswith("verdict:     valid\n")


@pytest.mark.parametrize("known", [True, False])
def test_an_expired_token_is_recognized_with_and_without_the_key(
    command: Command, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    token = TokenAuthority(SECRET, clock=FakeClock()).mint(["read:runs:run_1"], expires_in_s=60)
    if not known:
        monkeypatch.delenv("REALTIME_SECRET_KEY")
    done = command("token", "--explain", token)
    assert done.code == 1
    assert "verdict:     expired" in done.out
    assert " s ago\n" in done.out


def test_a_token_of_another_key_is_invalid_and_undecided_without_a_key(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = TokenAuthority("another secret that is long enough").mint(["read:runs:run_1"], expires_in_s=900)
    done = command("token", "--explain", token)
    assert done.code == 1 and "invalid: token has a wrong signature" in done.out
    monkeypatch.delenv("REALTIME_SECRET_KEY")
    done = command("token", "--explain", token)
    assert done.code == 0
    assert "valid if signed with your secret key; set $REALTIME_SECRET_KEY to check that" in done.out


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"pub": False}, "pub must be true"),
        ({"iss": "https://other.example"}, "wrong iss"),
        ({"scopes": "read:runs"}, "no valid scopes"),
    ],
)
def test_claims_are_checked_with_and_without_the_key(
    command: Command, monkeypatch: pytest.MonkeyPatch, known: bool, changed: dict[str, object], message: str
) -> None:
    claims = jwt.decode(AUTHORITY.mint(["read:runs"], expires_in_s=900), options={"verify_signature": False})
    if not known:
        monkeypatch.delenv("REALTIME_SECRET_KEY")
    done = command("token", "--explain", jwt.encode({**claims, **changed}, SECRET))
    assert done.code == 1 and message in done.out


def test_an_unsigned_token_is_invalid_even_without_the_key(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the key it was reported as usable."""
    claims = jwt.decode(AUTHORITY.mint(["read:runs"], expires_in_s=900), options={"verify_signature": False})
    monkeypatch.delenv("REALTIME_SECRET_KEY")
    done = command("token", "--explain", jwt.encode(claims, "", algorithm="none"))
    assert done.code == 1
    assert "signed with: none" in done.out and "invalid: token is not signed" in done.out


def test_a_misspelled_scope_grants_nothing(command: Command) -> None:
    done = command("token", "--explain", AUTHORITY.mint(["raed:runs"], expires_in_s=900))
    assert "grants:      raed:runs, which grants nothing: scope has the unknown action 'raed'" in done.out


def test_a_token_cannot_control_the_terminal(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    token = jwt.encode({"scopes": ["read:runs:\x1b[31mred"], "exp": 4e9, "iat": 1, "home": "\x1b]0;x\x07"}, SECRET)
    assert "\x1b[31mred" in command("token", "--explain", token).out
    monkeypatch.setattr(terminal, "_is_terminal", lambda stream: True)
    output = command("token", "--explain", token).out
    assert "\x1b" not in output
    assert "\N{REPLACEMENT CHARACTER}[31mred" in output


def test_a_token_can_grant_batches(command: Command) -> None:
    token = command("token", "--batch-trigger", "tasks:chat").out.strip()
    assert AUTHORITY.verify(token).scopes == ("batchTrigger:tasks:chat",)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["token"], "name at least one scope"),
        (["token", "--read", "foo"], "unknown type 'foo'"),
        (["token", "--read", "runs:run_1", "--expires-in", "soon"], "--expires-in is 'soon'"),
        (["token", "--read", "runs:run_1", "--skip", "id"], "skip_columns has 'id'"),
        (["token", "--explain", "abc"], "this is not a token"),
        (["nothing"], "invalid choice: 'nothing'"),
    ],
)
def test_wrong_usage_is_one_line_on_stderr(command: Command, arguments: list[str], message: str) -> None:
    done = command(*arguments)
    assert (done.code, done.out) == (2, "")
    assert message in done.err


def test_a_missing_secret_key_is_reported(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REALTIME_SECRET_KEY")
    done = command("token", "--read", "runs:run_1")
    assert done.code == 2 and "set $REALTIME_SECRET_KEY" in done.err


def test_a_new_secret_is_valid(command: Command) -> None:
    TokenAuthority(command("token", "--new-secret").out.strip())


def test_help_and_version(command: Command) -> None:
    assert "doctor" in command().out
    assert command("--version").out.strip() == asgi_realtime.__version__
