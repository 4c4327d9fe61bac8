"""What the local machine offers: a content cache, paths as users write them, work in a process of its own."""
