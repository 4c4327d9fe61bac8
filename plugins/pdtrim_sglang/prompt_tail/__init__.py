"""The last tokens of a prompt, which run the unchanged model, and the model that the tokens before them run."""
