"""`python -m pdtrim_deploy.kvcache.cpu`: compile the CPU's pack now, or say why it cannot be had."""

from pdtrim_deploy.kvcache.cpu.library import library

if library() is not None:
    print("kvcache: compiled for this CPU")
