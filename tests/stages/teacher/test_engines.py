"""The table of engines costs nothing to read."""

import subprocess
import sys


def test_importing_the_stage_loads_no_torch() -> None:
    code = "import sys, kdpipe.stages.teacher as t; assert t.ENGINES; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
