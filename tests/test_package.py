"""The package as a whole: what importing it costs."""

import os
import subprocess
import sys
from pathlib import Path

SRC = Path(__file__).resolve().parents[1] / "src"


def test_importing_needs_torch_alone_and_not_the_compiler() -> None:
    """Catches an import that takes seconds in every process, and a dependency of the trainer."""
    code = """
import sys
import torch
before = set(sys.modules)
import shuffle_batchnorm
new = {name.partition('.')[0] for name in set(sys.modules) - before}
heavy = {'kornia', 'matplotlib', 'sklearn', 'scipy', 'tqdm', 'tyro', 'jinja2', 'PIL', 'triton'}
print(sorted(new & heavy), 'torch._dynamo' in sys.modules and 'torch._dynamo' not in before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(SRC)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[] False"
