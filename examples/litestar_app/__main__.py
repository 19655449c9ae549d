"""`python -m examples.litestar_app`"""

from examples.server import run

run("examples.litestar_app.app:app")
