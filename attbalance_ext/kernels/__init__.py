"""The two fused ops below the public API: one folder an op, one file a backend."""
