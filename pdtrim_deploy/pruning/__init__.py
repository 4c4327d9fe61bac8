"""Which blocks each stage can do without."""
