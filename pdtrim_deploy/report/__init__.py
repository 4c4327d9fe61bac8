"""Results as metrics.json, tables and one HTML page."""
