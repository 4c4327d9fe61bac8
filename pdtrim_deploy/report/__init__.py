"""Results -> metrics.json and the table that people read."""
