from __future__ import annotations

import re

import pytest

from asgi_realtime.asgi.routes import ROUTES, Match, resolve

RUN = Match("v1/runs/{run_id}", ("run_1",))
STREAM = Match("v1/streams/{run_id}/{key}", ("run_1", "default"))
DEFAULT = ("run_1", "self", "default")
RETRIEVE = Match("api/v3/runs/{run_id}", ("run_1",))


@pytest.mark.parametrize(
    ("path", "root_path", "match"),
    [
        # the root app
        ("/v1/streams/run_1/default", "", STREAM),
        ("/v1/streams/run_1/input/approval", "", Match("v1/streams/{run_id}/input/{input_id}", ("run_1", "approval"))),
        ("/v1/streams/run_1/input", "", Match("v1/streams/{run_id}/{key}", ("run_1", "input"))),
        ("/v1/runs/run_1", "", RUN),
        ("/v1/runs", "", Match("v1/runs")),
        ("/v1/batches/batch_1", "", Match("v1/batches/{batch_id}", ("batch_1",))),
        ("/v1/health", "", Match("v1/health")),
        ("/api/v3/runs/run_1", "", RETRIEVE),
        ("/v1/streams/run_1/self/default/append", "", Match("v1/streams/{run_id}/{target}/{key}/append", DEFAULT)),
        ("/api/v1/packets", "", Match("api/v1/packets/*")),
        ("/api/v2/packets/a/b.json", "", Match("api/v2/packets/*")),
        ("/api/v2/runs/run_1/cancel", "", Match("api/v2/runs/{run_id}/cancel", ("run_1",))),
        # mounted at /realtime, with both base URLs of the official clients
        ("/realtime/v1/runs/run_1", "/realtime", RUN),
        ("/realtime/realtime/v1/runs/run_1", "/realtime", RUN),
        ("/realtime/api/v3/runs/run_1", "/realtime", RETRIEVE),
        # the same behind a proxy, whose prefix the server includes in the path or not
        ("/api/realtime/v1/runs/run_1", "/api/realtime", RUN),
        ("/realtime/v1/runs/run_1", "/api/realtime", RUN),
        ("/api/realtime/realtime/v1/runs/run_1", "/api/realtime", RUN),
        ("/realtime/api/v3/runs/run_1", "/api/realtime", RETRIEVE),
        ("/live/v1/runs/run_1", "/api/live", RUN),
        # Litestar: without the prefix, with a slash at the end, root_path unchanged
        ("/v1/runs/run_1/", "", RUN),
        ("/realtime/v1/runs/run_1/", "", RUN),
        ("/api/v3/runs/run_1/", "/api", RETRIEVE),
        ("/v1/runs/run_1/", "/v1", RUN),
        # dispatched by the host's own code, without root_path
        ("/realtime/v1/runs/run_1", "", RUN),
        ("/realtime/realtime/v1/runs/run_1", "", RUN),
        ("/realtime/api/v3/runs/run_1", "", RETRIEVE),
        # a run id that equals a segment of a pattern
        ("/v1/runs/realtime", "", Match("v1/runs/{run_id}", ("realtime",))),
        ("/v1/runs/runs", "/v1/runs", Match("v1/runs/{run_id}", ("runs",))),
    ],
)
def test_a_pattern_is_found_however_the_host_passes_the_path(path: str, root_path: str, match: Match) -> None:
    assert resolve(path, root_path) == match


@pytest.mark.parametrize(
    ("path", "root_path"),
    [
        ("", ""),
        ("/", ""),
        ("/realtime", "/realtime"),
        ("/realtime/", "/realtime"),
        ("X/", ""),  # Litestar, /realtimeX
        ("v1/runs/run_1/", ""),  # Litestar, /realtimev1/runs/run_1
        ("/realtimeX", "/realtim"),  # blacksheep
        ("/realtimev1/runs/run_1", "/realtime"),
        ("/realtime/realtime/realtime/v1/runs/run_1", ""),
        ("/v2/runs/run_1", ""),
        ("/v1", ""),
        ("/v1/run", ""),
        ("/v1//runs", ""),
        ("/v1/streams/run_1", ""),
        ("/v1/streams/run_1/a/b/c", ""),
        ("/v1/streams//default", ""),
        ("/v1/health/more", ""),
        ("/api/v1/runs/run_1", ""),
        ("/api/v2/runs/run_1", ""),
    ],
)
def test_similar_paths_match_no_pattern(path: str, root_path: str) -> None:
    assert resolve(path, root_path) is None


def test_every_pattern_can_be_reached() -> None:
    for route in ROUTES:
        path = re.sub(r"\{\w+\}", "x", route.pattern).replace("*", "x")
        assert resolve(f"/{path}") == Match(route.pattern, ("x",) * route.pattern.count("{")), route
