"""What can be checked on a machine with a GPU, part by part."""
