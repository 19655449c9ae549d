"""Arguments that the clients reject before they send a request."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import httpx
import pytest

import asgi_realtime.client
from asgi_realtime import InvalidConfiguration, InvalidToken, RealtimeError, UsageError
from asgi_realtime.client import RealtimeClient, SyncRealtimeClient

TOKEN = "aaa.bbb.ccc"
URL = "https://api.example.com/realtime"
CLIENTS = [RealtimeClient, SyncRealtimeClient]


@pytest.fixture(params=CLIENTS)
def make(request: pytest.FixtureRequest) -> Callable[..., Any]:
    made: Callable[..., Any] = request.param
    return made


@pytest.mark.parametrize(
    ("base_url", "words"),
    [
        ("", "pass the origin and the mount path"),
        ("api.example.com", "pass the origin and the mount path"),
        ("/realtime", "pass the origin and the mount path"),
        ("ftp://api.example.com", "pass the origin and the mount path"),
        ("https://", "pass the origin and the mount path"),
        ("https://api.example.com/realtime?access_token=x", "pass the origin and the mount path"),
        ("https://api.example.com/realtime#x", "pass the origin and the mount path"),
        ("https://api.example.com/realtime?", "has '\\?', '#', whitespace or control characters; pass"),
        ("https://api.example.com/realtime#", "has '\\?', '#', whitespace or control characters; pass"),
        ("https://api.example.com/real time", "has '\\?', '#', whitespace or control characters; pass"),
        (" https://api.example.com/realtime", "whitespace"),
        ("https://api.example.com/realtime\n", "base_url "),
        ("https://api.example.com/\0", "base_url "),
        ("https://api..example.com/", "base_url is not a URL"),
        (f"https://{'a' * 64}.example.com/", "base_url is not a URL"),
        ("https://xn--a.example.com/", "base_url is not a URL"),
        ("https://\N{PILE OF POO}.example.com/", "base_url is not a URL"),
        ("https://api.example.com:port/", "base_url is not a URL"),
        ("https://api.example.com:99999/", "base_url is not a URL: the port is 99999, limit 65535"),
        ("https://[::1/", "base_url is not a URL"),
        (None, "base_url is a NoneType"),
    ],
)
def test_base_url_must_be_an_origin_and_a_mount_path(make: Callable[..., Any], base_url: Any, words: str) -> None:
    with pytest.raises(InvalidConfiguration, match=words):
        make(base_url, TOKEN)


def test_a_password_in_base_url_is_refused_and_not_shown(make: Callable[..., Any]) -> None:
    with pytest.raises(InvalidConfiguration) as caught:
        make("https://user:password@api.example.com", TOKEN)
    assert "password@" not in str(caught.value)


@pytest.mark.parametrize("token", ["", " ", "aaa bbb", "aaa\n", "ä"])
def test_a_malformed_token_is_refused_and_not_shown(make: Callable[..., Any], token: str) -> None:
    with pytest.raises(InvalidToken) as caught:
        make(URL, token)
    assert str(caught.value) == "the access token is empty or has characters that no token contains"


@pytest.mark.parametrize("token", [None, b"aaa.bbb.ccc", 5])
def test_a_token_must_be_text_or_a_function(make: Callable[..., Any], token: Any) -> None:
    with pytest.raises(InvalidConfiguration, match="pass a str or a function that returns one"):
        make(URL, token)


@pytest.mark.parametrize("name", ["connect_timeout", "silence_timeout", "give_up_after"])
@pytest.mark.parametrize("value", [0, -1, "soon", True])
def test_timeouts_are_checked(make: Callable[..., Any], name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=name):
        make(URL, TOKEN, **{name: value})


Call = Callable[[Any], Any]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda client: client.read(""), "run_id ''"),
        (lambda client: client.read("."), "run_id '.'"),
        (lambda client: client.read("a/b"), "run_id 'a/b'"),
        (lambda client: client.read("run_1", ".."), "stream '..'"),
        (lambda client: client.read("run_1", "a?b"), "stream 'a"),
        (lambda client: client.read_indexed("run_1", "a\0"), "stream 'a"),
        (lambda client: client.read(None), "run_id is a NoneType"),
        (lambda client: client.read("run_1", start_index=-1), "start_index is -1"),
        (lambda client: client.read("run_1", start_index=True), "start_index is True"),
        (lambda client: client.read("run_1", start_index="1"), "start_index is '1'"),
        (lambda client: client.subscribe_to_run("a#b"), "run_id 'a#b'"),
        (lambda client: client.subscribe_to_batch("a\\b"), "batch_id 'a"),
        (lambda client: client.subscribe_to_runs_with_tag([]), "tags are empty"),
        (lambda client: client.subscribe_to_runs_with_tag(""), "a tag is empty"),
        (lambda client: client.subscribe_to_runs_with_tag(["a", " "]), "a tag is empty"),
        (lambda client: client.subscribe_to_runs_with_tag("a,b"), "tag 'a,b'"),
        (lambda client: client.subscribe_to_runs_with_tag([5]), "a tag is a int"),
        (lambda client: client.subscribe_to_runs_with_tag("a", created_within=0), "created_within is 0"),
    ],
)
def test_bad_arguments_are_refused_before_iteration(make: Callable[..., Any], call: Call, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        call(make(URL, TOKEN))
    assert words in str(caught.value)


def test_both_clients_have_the_same_calls() -> None:
    asynchronous, synchronous = ({name for name in dir(cls) if not name.startswith("_")} for cls in CLIENTS)
    assert asynchronous - {"aclose"} == synchronous - {"close"}


def test_repr_does_not_show_the_token(make: Callable[..., Any]) -> None:
    client = make(f"{URL}/", TOKEN)
    assert repr(client) == f"{make.__name__}({URL!r})"
    assert repr(client.read("run_1")).endswith("Subscription /v1/streams/run_1/default>")


@pytest.mark.anyio
async def test_an_async_client_closes_only_an_http_client_of_its_own() -> None:
    async with httpx.AsyncClient() as http:
        async with RealtimeClient(URL, TOKEN, http=http):
            pass
        assert not http.is_closed
    own = RealtimeClient(URL, TOKEN)
    await own.aclose()
    with pytest.raises(UsageError, match="this client is closed"):
        await own.get_run("run_1")
    with SyncRealtimeClient(URL, TOKEN) as threaded:
        pass
    with pytest.raises(UsageError, match="this client is closed"):
        threaded.read("run_1")


def test_public_names_are_sorted_and_documented() -> None:
    names = asgi_realtime.client.__all__
    assert list(names) == sorted(names)
    for name in names:
        assert getattr(asgi_realtime.client, name).__doc__
    errors = (asgi_realtime.client.ServerUnreachable, asgi_realtime.client.UnexpectedAnswer)
    assert all(issubclass(error, RealtimeError) for error in errors)


def test_without_httpx_the_error_names_the_extra() -> None:
    script = "import sys; sys.modules['httpx'] = None; import asgi_realtime.client"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "ModuleNotFoundError: the client needs httpx: pip install 'asgi_realtime[client]'" in done.stderr
