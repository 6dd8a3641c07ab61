"""Timing of the fused ops against everything a user could reasonably do instead.

`python -m benchmarks run` checks every provider against fp64 first, times the ones that pass, interleaved, and appends
one row per provider and mode to `results/results.jsonl`; `table` and `plot` read that file and nothing else.
GUIDELINES.md lists the traps the harness is built around.
"""
