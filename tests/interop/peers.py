"""What the interop tests share: the two sides, an oracle for guest content, temporary directories.

A side is a pair of tools, ours or the peer's (Debian's qemu-utils).  Every command that fails stops the
test with what was run and what it said, unless the caller expects it to fail.

SPDX-License-Identifier: MIT
"""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile

SKIP = 77


class Failed(Exception):
    """A test has found what it was looking for."""


class Side:
    """One side's tools."""

    def __init__(self, name, img, io):
        self.name, self.img_path, self.io_path = name, img, io

    def run(self, argv, check=True):
        env = dict(os.environ, LC_ALL="C")
        done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env,
                              stdin=subprocess.DEVNULL, timeout=300)
        text = done.stdout.decode(errors="replace")
        if done.returncode < 0 or "Sanitizer" in text or (check and done.returncode):
            raise Failed(f"{self.name}: {' '.join(argv)}\nexit status {done.returncode}\n{text}")
        return done.returncode, text

    def img(self, *args, check=True):
        return self.run([self.img_path, *map(str, args)], check)

    def io(self, image, *commands, fmt="qcow2", check=True, options=()):
        argv = [self.io_path, "-t", "writeback", "-d", "unmap", *options]
        if fmt:
            argv += ["-f", fmt]
        for command in commands:
            argv += ["-c", command]
        return self.run([*argv, image], check)

    def dies(self, image, *commands):
        """Runs qemu-io with the commands, flushes, and dies with the image open."""
        argv = [self.io_path, "-t", "writeback", "-d", "unmap", "-f", "qcow2"]
        for command in (*commands, "flush", "abort"):
            argv += ["-c", command]
        done = subprocess.run([*argv, image], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              stdin=subprocess.DEVNULL, timeout=300)
        if done.returncode != -signal.SIGABRT:
            text = done.stdout.decode(errors="replace")
            raise Failed(f"{self.name}: {' '.join(argv)}\nexit status {done.returncode}\n{text}")

    def check(self, image):
        """Checks the image; anything found is a failure."""
        self.img("check", "-f", "qcow2", image)

    def content(self, image, fmt="qcow2", snapshot=None):
        """Guest content as bytes."""
        out = image + ".content"
        extra = ["-l", snapshot] if snapshot else []
        self.img("convert", "-f", fmt, *extra, "-O", "raw", image, out)
        with open(out, "rb") as f:
            data = f.read()
        os.unlink(out)
        return data

    def info(self, image):
        return json.loads(self.img("info", "-f", "qcow2", "--output=json", image)[1])


def sides():
    """(ours, peer); skips the test when a tool is missing."""
    ours = Side("ours", os.environ.get("QEMU_IMG", ""), os.environ.get("QEMU_IO", ""))
    peer = Side("peer", os.environ.get("PEER_IMG", "/usr/bin/qemu-img"),
                os.environ.get("PEER_IO", "/usr/bin/qemu-io"))
    for tool in (ours.img_path, ours.io_path, peer.img_path, peer.io_path):
        if not shutil.which(tool):
            print(f"skipped: no tool '{tool}'")
            sys.exit(SKIP)
    return ours, peer


def first_difference(a, b):
    if len(a) != len(b):
        return f"{len(a)} bytes instead of {len(b)}"
    for i in range(0, len(a), 512):
        if a[i:i + 512] != b[i:i + 512]:
            return f"differs at offset {i}: {a[i:i + 8].hex()} instead of {b[i:i + 8].hex()}"
    return "equal"


def expect_content(side, image, expected, what, **how):
    got = side.content(image, **how)
    if got != bytes(expected):
        raise Failed(f"{what}: {side.name} reads {image}: {first_difference(got, bytes(expected))}")


def expect_snapshot(side, image, expected, name):
    """A snapshot's content. Some versions of the peer show it with the size of the active disk."""
    got = side.content(image, snapshot=name)
    if side.name == "peer":
        n = min(len(got), len(expected))
        got, expected = got[:n], expected[:n]
    if got != bytes(expected):
        raise Failed(f"snapshot {name}: {side.name} reads {image}: "
                     + first_difference(got, bytes(expected)))


def run_test(body):
    """Runs body(directory) in a fresh directory; exit status 1 and the story when it fails."""
    directory = tempfile.mkdtemp(prefix="interop.")
    try:
        body(directory)
    except Failed as failure:
        print(failure)
        return 1
    finally:
        if not os.environ.get("KEEP"):
            shutil.rmtree(directory, ignore_errors=True)
    return 0


def seed_from(argv):
    """--seed N, or a fresh one; printed so that a failure can be replayed."""
    seed = int(argv[argv.index("--seed") + 1]) if "--seed" in argv else random.randrange(1 << 31)
    others = [a for i, a in enumerate(argv[1:], 1) if "--seed" not in (a, argv[i - 1])]
    print(f"seed {seed} (replay: {' '.join([argv[0], *others])} --seed {seed})", flush=True)
    return seed
