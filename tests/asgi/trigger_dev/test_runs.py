from __future__ import annotations

import json

import pytest

from asgi_realtime.core.runs import Status
from asgi_realtime.testing import AsgiClient
from tests.asgi.fake_host import SECRET, FakeHost

pytestmark = pytest.mark.anyio

RETRIEVE = "/api/v3/runs/run_1"
CANCEL = "/api/v2/runs/run_1/cancel"


async def test_a_run_is_retrieved(host: FakeHost) -> None:
    await host.create(payload={"a": 1}, tags=["x"])
    response = await AsgiClient(host).get(RETRIEVE, headers=host.headers())
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert response.headers["cache-control"] == "private, no-store"
    run = json.loads(response.body)
    assert (run["id"], run["status"], run["payload"], run["tags"]) == ("run_1", "EXECUTING", {"a": 1}, ["x"])


async def test_retrieve_hides_the_columns_that_the_token_hides(host: FakeHost) -> None:
    await host.create(payload=1)
    headers = {"authorization": f"Bearer {host.token(skip_columns=['payload'])}"}
    response = await AsgiClient(host).get(RETRIEVE, headers=headers)
    assert "payload" not in json.loads(response.body)


async def test_retrieve_authenticates_then_finds_then_authorizes(host: FakeHost) -> None:
    assert (await AsgiClient(host).get(RETRIEVE)).status_code == 401
    assert (await AsgiClient(host).get(RETRIEVE, headers=host.headers())).status_code == 404
    await host.create()
    assert (await AsgiClient(host).get(RETRIEVE, headers=host.headers("read:runs:run_2"))).status_code == 403


async def test_a_missing_run_that_the_token_names_is_retried(host: FakeHost) -> None:
    """A handle often reaches the browser before its run reaches the broker. Other 404s are final for the client."""
    for scopes, again in ((("read:runs:run_1",), "true"), (("read:runs",), None), (("read:runs:run_2",), None)):
        response = await AsgiClient(host).get(RETRIEVE, headers=host.headers(*scopes))
        assert (response.status_code, response.headers.get("x-should-retry")) == (404, again)
        assert json.loads(response.body)["code"] == "run_not_found"
    response = await AsgiClient(host).get(RETRIEVE, headers={"authorization": f"Bearer {SECRET}"})
    assert (response.status_code, response.headers.get("x-should-retry")) == (404, None)


async def test_cancel_needs_the_secret_key_or_a_scope_for_it(host: FakeHost) -> None:
    await host.create()
    assert (await AsgiClient(host).post(CANCEL)).status_code == 401
    for scope in ("read:runs:run_1", "write:runs:run_2", "write:inputStreams:run_1"):
        assert (await AsgiClient(host).post(CANCEL, headers=host.headers(scope))).status_code == 403
    response = await AsgiClient(host).post(CANCEL, headers=host.headers("write:runs:run_1"))
    assert (response.status_code, json.loads(response.body)) == (200, {"id": "run_1"})
    assert (await host.get("run_1")).status is Status.CANCELED
    response = await AsgiClient(host).post(CANCEL, headers={"authorization": f"Bearer {SECRET}"})
    assert response.status_code == 200
    missing = await AsgiClient(host).post(CANCEL.replace("run_1", "run_2"), headers=host.headers("admin"))
    assert missing.status_code == 404
