"""Imported first by a script: Ctrl-C during the long imports ends it without a traceback."""

import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)


def listen() -> None:
    "From here on Ctrl-C is a KeyboardInterrupt again."
    signal.signal(signal.SIGINT, signal.default_int_handler)
