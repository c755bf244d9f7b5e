"""Put the experiments and launch scripts into the package: they lie at the repository's top."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

TOP = Path("experiments")


class BuildWithExperiments(build_py):
    """Copy `experiments/` to `clip_jax/experiments/`, where the package looks for it first."""

    def run(self):
        """Build, and copy unless the repository itself is what is imported."""
        super().run()
        if self.editable_mode:
            return
        for pattern in ("*.py", "launch/*.sh", "launch/*.yaml"):
            for path in TOP.glob(pattern):
                target = Path(self.build_lib, "clip_jax", path)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)


setup(cmdclass={"build_py": BuildWithExperiments})
