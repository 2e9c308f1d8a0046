"""Measures two sides at the same work, in turn, on identical copies of the same input.

    Lab          a directory for the inputs (made once) and for the copies that runs change
    Side         the tools of one side
    measure()    wall and CPU seconds of each side's runs, taken in turn
    count()      system calls, bytes written and barriers of one run, from strace

What is timed is the command alone: copying the input back and checking the result are not.  Figures
of one side mean nothing on a shared machine; the ratio of two taken in turn does.

Deliberately not done: no warm-up run is thrown away (the copy has just been in the caches of both), no
outliers are removed (the median does that).

SPDX-License-Identifier: MIT
"""
import json
import os
import re
import resource
import shutil
import statistics
import subprocess
import tempfile
import time

# A command that takes longer than this hangs.
LIMIT = 900


class Wrong(Exception):
    """A run failed, or what it left is not right."""


class Side:
    """The tools of one side; `{img}` and `{io}` in a command become these."""

    def __init__(self, name, directory):
        self.name = name
        self.tools = {tool: find(directory, "qemu-" + tool) for tool in ("img", "io")}

    def argv(self, command, **paths):
        return [part.format(**self.tools, **paths) for part in command]


def find(directory, tool):
    """A tool in an installed or a build directory."""
    for path in (os.path.join(directory, tool), os.path.join(directory, tool, tool)):
        if os.path.isfile(path):
            return path
    raise Wrong(f"no {tool} in {directory}")


def run(argv, env=None, text=None):
    """Runs a command to its end and returns what it printed."""
    done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=LIMIT,
                          input=text, env=dict(os.environ, LC_ALL="C", **(env or {})))
    out = done.stdout.decode(errors="replace")
    if done.returncode:
        raise Wrong(f"{' '.join(argv)[:300]}\nexit status {done.returncode}\n{out[-2000:]}")
    return out


class Lab:
    """Where inputs are kept and runs take place."""

    def __init__(self, parent):
        self.dir = tempfile.mkdtemp(prefix="qb-bench.", dir=parent)

    def close(self):
        shutil.rmtree(self.dir, ignore_errors=True)

    def path(self, *names):
        return os.path.join(self.dir, *names)

    def copy(self, files, name):
        """A fresh copy of the input's files in a directory of their own."""
        place = self.path(name)
        shutil.rmtree(place, ignore_errors=True)
        os.mkdir(place)
        for file in files:
            run(["cp", "--sparse=always", self.path("input", file), place])
        return place


class Cost:
    """What one run took."""

    def __init__(self, wall, cpu):
        self.wall, self.cpu = wall, cpu


def timed(argv):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.monotonic()
    out = run(argv)
    wall = time.monotonic() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(wall, cpu), out


def measure(lab, row, sides, repeat):
    """Runs the sides in turn; (costs, output) by side's name, the last run's result left in place."""
    costs = {side.name: [] for side in sides}
    outputs = {}
    for _ in range(repeat):
        for side in sides:
            place = lab.copy(row.files, side.name)
            cost, outputs[side.name] = timed(side.argv(row.command, dir=place))
            costs[side.name].append(cost)
    return costs, outputs


def median(costs, field):
    return statistics.median(getattr(cost, field) for cost in costs)


CALL = re.compile(r"^\d+\s+(?:<\.\.\. )?(\w+)(?:\(| resumed).*= (-?\d+)")
WRITES = {"write", "pwrite64", "writev", "pwritev", "pwritev2"}
BARRIERS = {"fdatasync", "fsync", "sync_file_range", "syncfs"}


def count(lab, row, side):
    """System calls, bytes written to files and barriers of one run.

    The I/O ring is forbidden for it, since strace does not see what goes through a ring; so the calls
    are those of the thread pool, an upper bound for ours.
    """
    place = lab.copy(row.files, side.name)
    log = lab.path("strace.log")
    argv = ["strace", "-f", "-qq", "-e", "signal=none", "-s", "0", "-o", log,
            *side.argv(row.command, dir=place)]
    run(argv, env={"QB_DISABLE_IO_URING": "1"})
    figures = {"calls": 0, "bytes": 0, "barriers": 0}
    with open(log, encoding="ascii", errors="replace") as lines:
        for line in lines:
            tally(line, figures)
    os.unlink(log)
    return figures


def tally(line, figures):
    found = CALL.match(line)
    if not found:
        return
    name, result = found[1], int(found[2])
    figures["calls"] += 1
    figures["barriers"] += name in BARRIERS
    if name in WRITES and result > 0 and "(1," not in line[:40]:
        figures["bytes"] += result


def virtual_size(image):
    info = json.loads(run(["qemu-img", "info", "-U", "--output=json", image]))
    return info["virtual-size"]
