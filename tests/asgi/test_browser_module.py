from __future__ import annotations

import gzip
from hashlib import sha256

import pytest

from asgi_realtime import Cors, Realtime
from asgi_realtime.asgi.browser_module import SOURCE
from asgi_realtime.testing import AsgiClient
from tests.asgi.fake_host import SECRET, FakeHost

pytestmark = pytest.mark.anyio

NAME = f"client-{sha256(SOURCE.read_bytes()).hexdigest()[:12]}.js"


@pytest.mark.parametrize("path", ["/client.js", "/realtime/client.js", f"/{NAME}"])
async def test_it_is_served_without_a_token_and_before_the_start(path: str) -> None:
    response = await AsgiClient(FakeHost(cors=Cors())).get(path)
    assert response.status_code == 200
    assert response.body == SOURCE.read_bytes()
    assert response.headers["content-type"] == "text/javascript; charset=utf-8"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["access-control-allow-origin"] == "*"  # a module of another origin needs it


@pytest.mark.parametrize(
    ("path", "cache_control"),
    [
        ("/client.js", "public, max-age=300"),
        (f"/{NAME}", "public, max-age=31536000, immutable"),
        ("/client-000000000000.js", "public, max-age=300"),  # of a page that another version of the server sent
    ],
)
async def test_only_the_name_with_the_hash_is_stored_forever(path: str, cache_control: str) -> None:
    response = await AsgiClient(FakeHost()).get(path)
    assert response.body == SOURCE.read_bytes()
    assert response.headers["cache-control"] == cache_control


@pytest.mark.parametrize("known", ['W/"{}"', '"{}"', '"other", W/"{}"'])
async def test_a_browser_that_has_it_gets_304(known: str) -> None:
    client = AsgiClient(FakeHost())
    etag = (await client.get("/client.js")).headers["etag"]
    headers = {"if-none-match": known.format(etag.split('"')[1])}
    response = await client.get("/client.js", headers=headers)
    assert (response.status_code, response.body) == (304, b"")
    assert response.headers["etag"] == etag
    assert (await client.get("/client.js", headers={"if-none-match": '"other"'})).status_code == 200


async def test_it_is_sent_compressed_to_clients_that_accept_it() -> None:
    response = await AsgiClient(FakeHost()).get("/client.js", headers={"accept-encoding": "br, gzip"})
    assert response.headers["content-encoding"] == "gzip"
    assert response.headers["vary"] == "Accept-Encoding"
    assert len(response.body) < 6 * 1024
    assert gzip.decompress(response.body) == SOURCE.read_bytes()


async def test_head_and_other_methods() -> None:
    client = AsgiClient(FakeHost())
    head = await client.request("HEAD", "/client.js")
    assert (head.status_code, head.body) == (200, b"")
    assert head.headers["content-length"] == str(SOURCE.stat().st_size)
    post = await client.post("/client.js")
    assert (post.status_code, post.headers["allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize("path", ["/clientXjs", "/client-.js", "/client-a/b.js", "/client.jsx", "/v1/client.js"])
async def test_other_paths_are_404(path: str) -> None:
    assert (await AsgiClient(FakeHost()).get(path)).status_code == 404


async def test_the_name_is_that_of_the_realtime() -> None:
    assert Realtime(secret_key=SECRET).client_js == NAME
