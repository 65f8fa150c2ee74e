"""``python -m shuffle_batchnorm``: the command ``shuffle-batchnorm``."""

from shuffle_batchnorm.moco.cli import run

if __name__ == "__main__":
    run()
