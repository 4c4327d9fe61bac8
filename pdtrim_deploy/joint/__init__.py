"""The joint choice: what both stages do with every block, and how its prompt KV travels, within several limits."""
