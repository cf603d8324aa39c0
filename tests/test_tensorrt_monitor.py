"""Long calls into TensorRT can be interrupted: they run on a thread, and signals come through meanwhile."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import pytest

from chunkkv_builder.backends.tensorrt.monitor import run_interruptibly

# `ends` says whether the call ends once it is asked to, as TensorRT does at its next step.
PROGRAM = """
import signal, sys, threading, time
from chunkkv.command_line import run_program, termination_as_exit
from chunkkv_builder.backends.tensorrt import monitor
ends, stop = sys.argv[1] == "ends", threading.Event()
monitor.GRACE_S = 30.0 if ends else 2.0
signal.signal(signal.SIGINT, signal.default_int_handler)
def call():
    print("ready", flush=True)
    stop.wait()
    print("asked to stop", flush=True)
    if not ends:
        while True:
            time.sleep(0.01)
def run(flags):
    with termination_as_exit():
        try:
            monitor.run_interruptibly(call, lambda error: stop.set())
        finally:
            print("cleaned up", flush=True)
run_program("chunkkv-build", lambda: None, run)
"""


@pytest.mark.parametrize("ends", ["ends", "hangs"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_call_and_the_process(number: signal.Signals, code: int, ends: str) -> None:
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, ends], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (code, "asked to stop\ncleaned up\n")


def test_results_and_errors_come_back() -> None:
    assert run_interruptibly(lambda: threading.current_thread() is threading.main_thread(), print) is False
    with pytest.raises(ZeroDivisionError):
        run_interruptibly(lambda: 1 / 0, print)
