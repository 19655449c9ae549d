"""`python -m examples.quart_app`"""

from examples.server import run

run("examples.quart_app.app:app")
