"""What an exit code says: shown by --help, and written into the documentation."""

EXIT_CODES = {
    0: "done",
    1: "a check failed, an engine could not be built, or a server died",
    2: "bad input, or something of this machine to mend: one sentence says what and how",
    129: "ended by SIGHUP, as gently as by Ctrl-C",
    130: "stopped by Ctrl-C; nothing half-written is left, the same command goes on where it can",
    141: "the reader of our output went away",
    143: "ended by SIGTERM, as gently as by Ctrl-C",
}
