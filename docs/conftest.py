"""What pytest leaves alone here: scripts, and pages that repeat the docstrings' examples."""

collect_ignore = ["generate.py", "docstrings.py", "picture.py"]
collect_ignore_glob = ["reference/*", "methods.md"]
