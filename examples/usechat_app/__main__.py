"""`python -m examples.usechat_app`: build the page, and run the app with a model and Redis, until Ctrl-C."""

from __future__ import annotations

from examples.local_model import model_endpoint
from examples.usechat_app.serving import main

if __name__ == "__main__":
    main("examples.usechat_app.app:app", model_endpoint())
