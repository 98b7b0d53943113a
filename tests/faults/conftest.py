"""The modules of this folder import each other by name; it is no package."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from forked import Forked

sys.path.insert(0, str(Path(__file__).parent))

import killed_at
import runs


def start_process(command: Sequence[str], **how: Any) -> Any:
    """Forked where no import matters and nothing but us looks for it."""
    fresh = killed_at.IMPORT in command or "torch.distributed.run" in command or command[0] != sys.executable
    return (subprocess.Popen if fresh else Forked)(command, **how)


runs.start_process = start_process
