"""torchrun on one machine, without tracebacks of its own: python -m train.loop.launch --nproc-per-node 2 SCRIPT ...

The exit code is that of the first process that failed, or 128 plus the signal that stopped all of them.
"""

from __future__ import annotations

import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun


def main() -> None:
    try:
        torchrun(["--standalone", *sys.argv[1:]])  # a free port: several trainings can run on one machine
    except SignalException as stopped:
        sys.exit(128 + stopped.sigval)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        sys.exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)


if __name__ == "__main__":
    main()
