"""Death of the parent: an engine's process ends with the actor that started it, even if SIGKILL ended the actor."""

import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """In a process that multiprocessing started: exit once the parent is gone. Elsewhere: nothing."""
    parent = multiprocessing.parent_process()
    if parent is None or any(t.name == "end-with-parent" for t in threading.enumerate()):
        return

    def watch() -> None:
        parent.join()  # also if a server forked this process: a pipe of the parent's closes
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()
