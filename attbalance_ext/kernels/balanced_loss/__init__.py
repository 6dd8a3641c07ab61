"""The `balanced_loss` op: one file a backend."""
