"""The public names are sorted, exist, are documented, and include no private modules."""

from __future__ import annotations

import inspect
import types
from typing import Any

import pytest

import asgi_realtime
import asgi_realtime.ai
import asgi_realtime.brokers
import asgi_realtime.client
import asgi_realtime.tasks
import asgi_realtime.testing

PACKAGES = [
    asgi_realtime,
    asgi_realtime.ai,
    asgi_realtime.brokers,
    asgi_realtime.client,
    asgi_realtime.tasks,
    asgi_realtime.testing,
]
PUBLIC = [(package, name) for package in PACKAGES for name in package.__all__]
CLASSES = [
    (name, getattr(asgi_realtime, name))
    for name in asgi_realtime.__all__
    if inspect.isclass(getattr(asgi_realtime, name))
]


@pytest.mark.parametrize("package", PACKAGES)
def test_exported_names_exist_and_are_sorted(package: types.ModuleType) -> None:
    assert list(package.__all__) == sorted(package.__all__)
    assert len(set(package.__all__)) == len(package.__all__)
    for name in package.__all__:
        assert not name.startswith("_")
        assert hasattr(package, name)


def test_every_public_object_of_the_package_is_exported() -> None:
    found = {
        name
        for name, value in vars(asgi_realtime).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType) and name != "annotations"
    }
    assert found == set(asgi_realtime.__all__)


def test_every_error_that_a_user_can_catch_is_exported() -> None:
    own = {
        "AuthorizeFailed",  # internal errors and errors of a request
        "InvalidRequest",
        "InvalidTransition",
        "ProducerGap",
        "ServerShutdown",
        "StateError",
        "TokenError",
        "TokenSpent",
        "VersionConflict",
    }
    from asgi_realtime.core import errors, run_errors

    defined = {
        name
        for module in (errors, run_errors)
        for name, value in vars(module).items()
        if inspect.isclass(value) and value.__module__ == module.__name__
    }
    assert defined - own <= set(asgi_realtime.__all__)


@pytest.mark.parametrize(("package", "name"), PUBLIC)
def test_everything_is_documented(package: types.ModuleType, name: str) -> None:
    value = getattr(package, name)
    if inspect.isclass(value) or inspect.isroutine(value):
        assert value.__doc__ and not value.__doc__.startswith(f"{name}("), name


def members(cls: Any) -> list[tuple[str, Any]]:
    return [
        (name, member.fget if isinstance(member, property) else getattr(member, "__func__", member))
        for name, member in inspect.getmembers_static(cls)
        if not name.startswith("_") and (inspect.isfunction(member) or isinstance(member, property))
    ]


@pytest.mark.parametrize(
    "cls",
    [asgi_realtime.Realtime, asgi_realtime.Run, asgi_realtime.Pipe, asgi_realtime.RunHandle, asgi_realtime.BatchHandle],
)
def test_every_method_of_the_main_classes_is_documented(cls: type) -> None:
    assert [name for name, member in members(cls) if not inspect.getdoc(member)] == []


def test_all_arguments_after_two_are_keyword_only() -> None:
    for name, member in members(asgi_realtime.Realtime):
        positional = [
            parameter
            for parameter in inspect.signature(member).parameters.values()
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD and parameter.name != "self"
        ]
        assert len(positional) <= 3, name
        assert all(parameter.default is parameter.empty for parameter in positional[:0]), name


def test_the_package_is_typed() -> None:
    from pathlib import Path

    assert (Path(asgi_realtime.__file__).parent / "py.typed").exists()
