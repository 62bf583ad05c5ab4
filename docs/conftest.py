"""What pytest leaves alone here: scripts, and pages that repeat the docstrings' examples."""

from secateur.runtime import available

collect_ignore = ["generate.py", "docstrings.py", "picture.py"]
collect_ignore_glob = ["reference/*", "methods.md"]
if not available():  # their examples run our kernels
    collect_ignore += ["tutorial.md", "howto/runtime.md", "howto/install-native.md"]
