"""`python -m examples.fastapi_app`"""

from examples.server import run

run("examples.fastapi_app.app:app")
