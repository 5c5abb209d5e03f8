"""Death of the parent: an engine's process ends with the actor that started it, also when SIGKILL ended that one."""

import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """In a process that multiprocessing started: exit once the parent is gone. Elsewhere: nothing."""
    parent = multiprocessing.parent_process()
    if parent is None or any(t.name == "end-with-parent" for t in threading.enumerate()):
        return

    def watch() -> None:
        parent.join()  # of a process that a server forked as well: a pipe of the parent's closes
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()
