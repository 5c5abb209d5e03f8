"""An engine's process must not outlive the actor that started it, even one that was killed with SIGKILL."""

import multiprocessing
import os
import threading
import time

CHECK_EVERY = 1.0


def end_with_parent() -> None:
    """In a process that multiprocessing spawned: exit once the parent is gone. Elsewhere: nothing."""
    if multiprocessing.parent_process() is None or any(t.name == "end-with-parent" for t in threading.enumerate()):
        return
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(CHECK_EVERY)
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()
