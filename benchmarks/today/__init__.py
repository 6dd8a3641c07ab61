"""AttBalance as people compute it today: materialised attention, painted masks, SciPy in the middle of a step.

It is charged for what this way has to compute and no more. GUIDELINES.md lists where it is given the benefit of the
doubt.
"""
