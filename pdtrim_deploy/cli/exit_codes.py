"""What an exit code says: shown by --help, and written into the documentation."""

EXIT_CODES = {
    0: "done",
    1: "a check failed, an engine could not be built, or a server died",
    2: "bad input, or a fault of this machine: one sentence says what to do",
    129: "ended by SIGHUP, with the same cleaning up as Ctrl-C",
    130: "stopped by Ctrl-C; no half-written file is left, and the same command resumes where it can",
    141: "the program that read the output (a pipe) has ended",
    143: "ended by SIGTERM, with the same cleaning up as Ctrl-C",
}
