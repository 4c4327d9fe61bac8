"""Stage graph and its engine targets."""
