"""Small wrong edits, each of which some test has to notice.

    python -m tests.mutations                 # all of them; goes on where a run was killed
    python -m tests.mutations --only 'cuda/*'

``lists/*.toml`` say what is changed, why that is wrong, and which tests are to fail. Edits are made in a copy of the
checkout, one at a time.
"""
