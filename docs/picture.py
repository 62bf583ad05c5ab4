"""Turn what a command printed into an SVG picture, for the README.

FORCE_COLOR=1 COLUMNS=100 make demo > demo.log
python docs/picture.py demo.log docs/demo.svg
"""

import argparse
import io
import re
from pathlib import Path

from rich.console import Console
from rich.text import Text


def picture(log: str) -> str:
    """Draw the result of `secateur prune` in a log: its comparison table and the verdict.

    Args:
        log: The output, with colours as escape sequences.

    Returns:
        An SVG document.
    """
    lines = [re.sub(r"\x1b\[[0-9?]*[A-Za-ln-z]", "", line) for line in log.splitlines()]
    start = next(i for i, line in enumerate(lines) if "before" in line and "after" in line)
    end = next(i for i, line in enumerate(lines) if i > start and "Left dense" in line)
    console = Console(record=True, width=100, file=io.StringIO())
    for line in lines[start:end]:
        console.print(Text.from_ansi(line.split("\r")[-1]))
    svg = console.export_svg(title="secateur prune: Fashion-MNIST, 90 % sparse")
    return re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)  # no font from a server


def main() -> None:
    """Read the two paths and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("log", type=Path)
    parser.add_argument("svg", type=Path)
    names = parser.parse_args()
    names.svg.write_text(picture(names.log.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
