from __future__ import annotations

import json

import pytest

from asgi_realtime.testing import AsgiClient
from tests.asgi.fake_host import FakeHost
from tests.asgi.official_sdk import on_one_loop

pytestmark = pytest.mark.anyio

PATHS = ["/v1/runs/run_1?offset=-1", "/v1/streams/run_1/default"]


@on_one_loop
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("version", ["4.0.7", "3.3.17", "4.0.0-v4-beta.1"])
async def test_a_client_before_4_1_gets_an_error_that_names_its_version(
    host: FakeHost, path: str, version: str
) -> None:
    """`withStreams()` waited forever."""
    await host.create()
    response = await AsgiClient(host).get(path, headers=host.headers(trigger_version=version))
    assert response.status_code == 400
    message = json.loads(response.body)["error"]
    assert f"version {version}" in message
    assert "allowed is 4.1 or newer" in message


@on_one_loop
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("version", ["4.1.0", "4.8.3", "10.0.0", "0.0.0-prerelease-1", "", "latest"])
async def test_other_clients_are_served(host: FakeHost, path: str, version: str) -> None:
    await host.create()
    await host.finish()
    response = await AsgiClient(host).get(path, headers=host.headers(trigger_version=version))
    assert response.status_code == 200
