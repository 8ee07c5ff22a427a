"""`golden`: one fixture file per folder for the kind that a test module names in `KIND`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import golden_folders
from tests.golden_fixtures.golden import Golden


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden" not in metafunc.fixturenames:
        return
    kind = metafunc.module.KIND
    found = [g for f in golden_folders(metafunc.config) if (g := Golden(f, kind)).path.is_file()]
    metafunc.parametrize(
        "golden", found, ids=[f"{g.folder.name}-{kind}" for g in found], indirect=True
    )


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Iterator[Golden]:
    fixture: Golden = request.param
    fixture.failures.clear()
    yield fixture
    if fixture.failures:
        pytest.fail("\n".join(fixture.failures))
