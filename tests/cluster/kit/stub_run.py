"""Stands for engine/run.py where only SLURM and the templates are looked at: ends as it is told.

PLAN is "RESTART.RANK=HOW" by commas, in an array "TASK/RESTART.RANK=HOW" (a star for any rank): HOW
is an exit code, or -SIGNAL. Without an entry a rank
waits to be signalled (exit 75) in the first run, and ends well in later ones.
"""

import os
import signal
import sys
import time

for number in (signal.SIGTERM, signal.SIGUSR2):
    signal.signal(number, lambda *_: sys.exit(75))
plan = dict(entry.split("=") for entry in os.environ["PLAN"].split(",") if entry)
restart, rank = os.environ.get("SLURM_RESTART_COUNT", "0"), os.environ["SLURM_PROCID"]
print(f"run {restart} rank {rank} {' '.join(sys.argv[1:])}", flush=True)
task = os.environ.get("SLURM_ARRAY_TASK_ID", "")
keys = [f"{restart}.{rank}", f"{restart}.*", f"{task}/{restart}.*"]
how = next((plan[key] for key in keys if key in plan), None)
if how is not None:
    time.sleep(0.3)  # the others are up by then
    if int(how) < 0:
        os.kill(os.getpid(), -int(how))
    sys.exit(int(how))
if restart == "0":
    time.sleep(300)
