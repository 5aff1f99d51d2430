"""Runs LocalStack, and ends with whoever holds the other end of standard input.

A test process that is killed cannot clean up, but the kernel closes its pipes.
"""

import os
import shutil
import threading


def end_with_parent():
    while os.read(0, 4096):
        pass
    shutil.rmtree(os.environ["FILESYSTEM_ROOT"], ignore_errors=True)
    os._exit(0)


threading.Thread(target=end_with_parent, daemon=True).start()

from localstack.runtime.main import main  # noqa: E402

main()
