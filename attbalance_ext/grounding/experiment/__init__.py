"""Studies: grids of training runs with seeds, each cell a small file that says all that is known of it."""
