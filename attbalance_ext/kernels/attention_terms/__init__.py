"""The `attention_terms` op: one file a backend."""
