"""What all tests share."""

from pathlib import Path

import pytest

from tests.recorded import FIXTURES, all_fixtures, restore


@pytest.fixture
def fixture_dir(request: pytest.FixtureRequest) -> Path:
    """A directory of one's own with the fixtures in it, uncompressed and with their holes.

    A test marked `@pytest.mark.datafiles(FIXTURES / "disk.qcow2", ...)` gets the images that it names (and
    the files that they need), any other test gets all. A compressed image is named as it is stored,
    `FIXTURES / "NAME.gz"`, and appears under its own name.
    """
    if request.node.get_closest_marker("datafiles") is None:
        request.applymarker(pytest.mark.datafiles(FIXTURES))
    directory: Path = request.getfixturevalue("datafiles")
    for fixture in all_fixtures():
        # datafiles copies what is stored: dense files, some of them compressed.
        if (directory / fixture.path.name).exists():
            restore(fixture.name, directory)
            (directory / f"{fixture.name}.gz").unlink(missing_ok=True)
    return directory
