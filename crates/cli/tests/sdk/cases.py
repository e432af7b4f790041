"""Cases of a Python SDK, each run in a process of its own: `SCRIPT --list`, or `SCRIPT ADDRESS CASE`."""

import os
import signal
import sys
import time
import traceback

ADDRESS = sys.argv[1] if len(sys.argv) > 1 else ""
CASES = {}


def case(function):
    CASES[function.__name__] = function
    return function


def equal(found, expected, about=""):
    assert found == expected, f"{about}\n  found:    {found!r}\n  expected: {expected!r}"


def until(probe, about, seconds=40, pause=0.02):
    """What a probe finds, once it is something; what the SDK says only by callbacks has to be asked for."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = probe()
        if found:
            return found
        time.sleep(pause)
    raise AssertionError(f"{about}: nothing within {seconds} s")


def crash():
    """Kills the broker, which the test starts again."""
    os.kill(int(os.environ["BROKER_PID"]), signal.SIGKILL)


def main():
    if ADDRESS == "--list":
        print("\n".join(CASES))
        return
    try:
        CASES[sys.argv[2]]()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    # Threads of the SDK that still run are not waited for.
    sys.stdout.flush()
    os._exit(0)
