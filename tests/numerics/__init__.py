"""How wrong the ops may be: problems where numbers go bad, a bound for every quantity, and the measurement of both.

`docs/numerics.md` states the bounds; `python -m scripts.numerics` writes them there, with what was measured.
"""
