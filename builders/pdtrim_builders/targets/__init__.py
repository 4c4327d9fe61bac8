"""The engine formats."""
