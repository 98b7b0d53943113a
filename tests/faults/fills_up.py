"""Run the command line on a disk that is full only after it was asked how much room there is.

    python fills_up.py train --plugin ...

Something else takes the room meanwhile; the answer is replaced here, so that a write fails in its middle.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    own = shutil.disk_usage

    def before_the_write(path: Path) -> Any:
        begun = any(Path(path).glob(".step-*"))
        return own(path) if begun else own(path)._replace(free=1 << 40)

    shutil.disk_usage = before_the_write  # type: ignore[assignment]
    from selfsup.cli.main import main

    main(sys.argv[1:])
