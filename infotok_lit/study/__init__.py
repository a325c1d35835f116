"""Studies: many `fit` runs under one budget, compared over seeds (rows) or searched (a sweep)."""
