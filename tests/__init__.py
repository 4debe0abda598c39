"""Tests; a package, so that nothing else named `tests` on the path is found in its place."""
