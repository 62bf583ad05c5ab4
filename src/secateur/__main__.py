"""``python -m secateur`` is the command ``secateur``."""

from secateur.cli.main import run

if __name__ == "__main__":
    run()
