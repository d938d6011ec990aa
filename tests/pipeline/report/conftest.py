"""A browser for the tests that open a page; one process for all of them."""

from collections.abc import Iterator

import pytest
from tests.browser import Browser, find_browser


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    program = find_browser()
    if program is None:
        pytest.skip("no Chromium, and no right to install Debian's: apt-get install chromium")
    with Browser(program) as found:
        yield found
