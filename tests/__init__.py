"""A package so that `tests.emulation` can be imported from the repository's root."""
