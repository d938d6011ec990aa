"""The tokenizers of tests/stages/prepare."""

from tests.stages.prepare.conftest import base as base
from tests.stages.prepare.conftest import chatml as chatml
from tests.stages.prepare.conftest import kit as kit
