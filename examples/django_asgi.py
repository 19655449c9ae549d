"""A Django app in one file: sync and async views, and a page that shows the progress of a job.

To run it: `pip install . django 'uvicorn[standard]'`, then `uvicorn examples.django_asgi:app`.
"""

import math
import os
import secrets
from typing import Any

from django.conf import settings
from django.core.asgi import get_asgi_application
from django.http import Http404, HttpRequest, HttpResponse, JsonResponse
from django.middleware.csrf import get_token
from django.urls import path
from django.views.decorators.http import require_POST

from asgi_realtime import Realtime, RealtimeMiddleware, Run, RunNotFound

SECRET_KEY = os.environ.get("DJANGO_SECRET_KEY") or secrets.token_urlsafe(32)

realtime = Realtime(secret_key=os.environ.get("REALTIME_SECRET_KEY") or secrets.token_urlsafe(32))


@realtime.task("primes", max_duration="1m")
def primes(limit: int, run: Run) -> dict[str, int]:
    """A `def` task runs in its own thread, so it can compute or use Django's ORM."""
    found = 0
    for number in range(2, limit + 1):
        if all(number % divisor for divisor in range(2, math.isqrt(number) + 1)):
            found += 1
            realtime.sync.append(number)
        run.metadata.set("progress", number / limit)
    return {"found": found}


def index(request: HttpRequest) -> HttpResponse:
    response = HttpResponse(PAGE.replace("CSRF_TOKEN", get_token(request)))
    user = request.COOKIES.get("user") or secrets.token_urlsafe()  # replace this with your own sign-in
    response.set_cookie("user", user, httponly=True, samesite="Lax")
    return response


def start(request: HttpRequest) -> JsonResponse:
    """A sync view runs in a thread, so it uses `realtime.sync`."""
    limit = max(2, min(int(request.POST.get("limit", 1000)), 100_000))
    handle = realtime.sync.trigger(primes, limit, tags=[f"user:{request.COOKIES['user']}"])
    return JsonResponse(handle)


async def stop(request: HttpRequest, run_id: str) -> HttpResponse:
    """An async view runs on the event loop, so it uses `await`."""
    try:
        run = await realtime.get_run(run_id)
    except RunNotFound:
        raise Http404 from None
    if f"user:{request.COOKIES.get('user')}" not in run.tags:
        raise Http404
    await realtime.cancel(run)
    return HttpResponse(status=204)


PAGE = """<!doctype html>
<html lang="en">
  <head>
    <meta charset="utf-8" />
    <meta name="viewport" content="width=device-width, initial-scale=1" />
    <meta name="color-scheme" content="light dark" />
    <title>Primes · asgi_realtime</title>
    <link rel="icon" href="data:," />
    <style>
      body { font: 16px/1.5 system-ui, sans-serif; max-width: 42rem; margin: 3rem auto; padding: 0 1rem; }
      form, footer { display: flex; gap: 0.75rem; align-items: center; }
      input { font: inherit; width: 8rem; padding: 0.3rem 0.5rem; }
      button { font: inherit; padding: 0.3rem 1rem; }
      progress { width: 100%; margin: 1rem 0 0.5rem; }
      #numbers { max-height: 22rem; overflow: auto; font-variant-numeric: tabular-nums; }
    </style>
  </head>
  <body>
    <h1>Primes</h1>
    <form id="form">
      <label for="limit">All primes up to</label>
      <input id="limit" name="limit" type="number" min="2" max="100000" value="5000" required />
      <button>Find them</button>
    </form>
    <progress id="progress" value="0"></progress>
    <footer>
      <span id="status" role="status"></span>
      <button id="stop" type="button" hidden>Stop</button>
    </footer>
    <p id="numbers" aria-label="Primes found so far"></p>
    <script type="module">
      const $ = (id) => document.getElementById(id);
      const post = (path, body) =>
        fetch(path, { method: "POST", body, headers: { "x-csrftoken": "CSRF_TOKEN" } });
      let sources = [];
      let run = null;

      function show(state) {
        $("status").textContent = state.output ? `${state.status}: ${state.output.found} primes` : state.status;
        $("status").dataset.status = state.status;
        $("progress").value = state.metadata.progress ?? 0;
        $("stop").hidden = state.isCompleted;
      }

      function open(path, onEvent) {
        const source = new EventSource(`/realtime/v1/${path}?access_token=${run.publicAccessToken}`);
        for (const [name, handler] of Object.entries(onEvent)) source.addEventListener(name, handler);
        source.addEventListener("end", () => source.close()); // otherwise the browser reconnects
        sources.push(source);
      }

      $("form").addEventListener("submit", async (event) => {
        event.preventDefault();
        sources.forEach((source) => source.close());
        sources = [];
        $("numbers").textContent = "";
        run = await (await post("/start", new FormData(event.target))).json();
        open(`runs/${run.id}`, { run: (event) => show(JSON.parse(event.data)) });
        open(`streams/${run.id}/default`, { message: (event) => $("numbers").append(`${event.data} `) });
      });
      $("stop").addEventListener("click", () => post(`/stop/${run.id}`));
    </script>
  </body>
</html>
"""

urlpatterns = [path("", index), path("start", require_POST(start)), path("stop/<run_id>", require_POST(stop))]
settings.configure(
    SECRET_KEY=SECRET_KEY,
    ALLOWED_HOSTS=["localhost", "127.0.0.1", "[::1]"],
    MIDDLEWARE=["django.middleware.csrf.CsrfViewMiddleware"],
    ROOT_URLCONF=__name__,
)
# Django has no lifespan, so the middleware handles the lifespan events of the server.
app: Any = RealtimeMiddleware(get_asgi_application(), realtime)

if __name__ == "__main__":
    import uvicorn

    uvicorn.run(app, port=int(os.environ.get("PORT", "8000")))
