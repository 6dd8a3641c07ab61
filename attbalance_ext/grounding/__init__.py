"""The reference trainer: grounding models, data, training and reports, all built on the public API.

Nothing here is needed to use the loss in a model of your own; it shows one complete way to do it, and it is
what the ``attbalance`` command runs.
"""
