"""What importing wherefrom brings with it: nothing that takes long and that most calls do not need."""

from __future__ import annotations

import subprocess
import sys

HEAVY = (
    "transformers",
    "datasets",
    "scipy",
    "matplotlib",
    "tyro",
    "torch.distributed.tensor",
    "torch.distributed.fsdp",
    "sympy",
)


def test_importing_the_library_imports_nothing_heavy() -> None:
    program = f"import sys, wherefrom; wherefrom.evaluate; print([name for name in {HEAVY!r} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
