"""The rows of the benchmark: input, command, what the result must be, and the ratio we promise.

A row's files are made once, by the peer's tools where that is bearable, else by ours (the format is the
same, and both sides get the same bytes).  `same` says how results are compared: by guest content, by
virtual size, or by what was printed.

SPDX-License-Identifier: MIT
"""
import json
import random

from lab import Wrong, run, virtual_size

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40


class Row:
    def __init__(self, name, ratio, files, make, command, **more):
        self.name, self.ratio, self.files, self.make, self.command = name, ratio, files, make, command
        self.same = more.get("same", content)
        self.gates = more.get("gates", {})      # figure -> most for ours, or (most of theirs' share)
        self.slow = more.get("slow", False)     # theirs takes a minute: once is enough
        self.limit = more.get("limit")          # command whose time is the physical limit
        self.alone = more.get("alone", False)   # the peer has no such command, or it proves nothing


# --- inputs -------------------------------------------------------------------------------------

def create(maker, lab, name, size, *options):
    run([maker.tools["img"], "create", "-q", "-f", "qcow2", *options, lab.path("input", name), str(size)])


def prepared(size, *options, data=0):
    """An image with all its metadata allocated, and with so many bytes of data from the start."""
    def make(lab, ours, peer):
        create(ours, lab, "a", size, "-o", "preallocation=metadata", *options)
        fill(lab, ours, "a", range(0, data, MIB), MIB)
    return make


def fill(lab, maker, name, offsets, length, pattern=None):
    """Writes pieces; each has a pattern of its own, so that a misplaced one is found."""
    lines = [f"write -q -P {pattern or 1 + at // length % 251} {at} {length}" for at in offsets]
    if lines:
        script = "\n".join([*lines, "flush", "quit", ""])
        run([maker.tools["io"], "-t", "writeback", "-f", "qcow2", lab.path("input", name)],
            text=script.encode())


def scattered(size, data, name="a", before=None):
    """So much data in clusters of 64 KiB at random places, allocated in that order."""
    def make(lab, ours, peer):
        if before:
            before(lab, ours, peer)
        else:
            create(peer, lab, name, size)
        places = random.Random(size + data).sample(range(size // (64 * KIB)), data // (64 * KIB))
        fill(lab, ours, name, [place * 64 * KIB for place in places], 64 * KIB)
    return make


def empty(size):
    def make(lab, ours, peer):
        create(peer, lab, "a", size)
    return make


def of_clusters(size, cluster):
    def make(lab, ours, peer):
        create(peer, lab, "a", size, "-o", f"cluster_size={cluster}")
    return make


def fragments(count):
    """Every second cluster of 4 KiB holds data."""
    def make(lab, ours, peer):
        create(peer, lab, "a", count * 8 * KIB, "-o", "cluster_size=4k")
        fill(lab, ours, "a", range(0, count * 8 * KIB, 8 * KIB), 4 * KIB)
    return make


def overlay(size, *options):
    """An empty base and an overlay of the same size on it."""
    def make(lab, ours, peer):
        create(peer, lab, "base", size)
        create(ours, lab, "a", size, "-b", "base", "-F", "qcow2", *options)
    return make


def then(first, *steps):
    """First one input, then commands of ours on it."""
    def make(lab, ours, peer):
        first(lab, ours, peer)
        for step in steps:
            run(ours.argv(step, dir=lab.path("input")))
    return make


def bitmaps(size):
    def make(lab, ours, peer):
        create(peer, lab, "a", size)
        for number in range(4):
            run([peer.tools["img"], "bitmap", "--add", lab.path("input", "a"), f"b{number}"])
        run([peer.tools["io"], "-f", "qcow2", "-c", f"write -q 0 {MIB}", "-c", f"write -q {size // 2} {MIB}",
             lab.path("input", "a")])
    return make


def two_bitmaps(lab, ours, peer):
    bitmaps(4 * TIB)(lab, ours, peer)


# --- what results must be -----------------------------------------------------------------------

def checked(lab, name):
    run(["qemu-img", "check", "-q", lab.path(name, "a")])


def sizes(lab, outputs):
    """Both are sound and of the same virtual size."""
    for name in outputs:
        checked(lab, name)
    found = {virtual_size(lab.path(name, "a")) for name in outputs}
    if len(found) != 1:
        raise Wrong(f"virtual sizes differ: {found}")


def content(lab, outputs):
    """Both are sound, and the guest reads the same."""
    sizes(lab, outputs)
    if len(outputs) == 2:
        run(["qemu-img", "compare", "-q", *(lab.path(name, "a") for name in outputs)])


def bases(lab, outputs):
    """Both overlays are empty, and the guest reads the same from both bases."""
    for name in outputs:
        checked(lab, name)
        mapped = json.loads(run(["qemu-img", "map", "--output=json", lab.path(name, "a")]))
        if any(extent["depth"] == 0 for extent in mapped):
            raise Wrong(f"{name}: the overlay is not empty")
    if len(outputs) == 2:
        run(["qemu-img", "compare", "-q", *(lab.path(name, "base") for name in outputs)])


def converted(lab, outputs):
    """What was written to b is sound and reads as the source does."""
    for name in outputs:
        run(["qemu-img", "check", "-q", lab.path(name, "b")])
        run(["qemu-img", "compare", "-q", lab.path(name, "a"), lab.path(name, "b")])


def printed(lab, outputs):
    """The same but for keys that a peer's version does not have yet."""
    lists = [json.loads(text) for text in outputs.values()]
    known = set.intersection(*(set(entry) for entries in lists for entry in entries[:1]))
    texts = {json.dumps([{key: entry[key] for key in entry if key in known} for entry in entries])
             for entries in lists}
    if len(texts) != 1:
        raise Wrong("what was printed differs")


# --- the rows -----------------------------------------------------------------------------------

def io(*commands, options=("-t", "writeback", "-d", "unmap"), image="{dir}/a"):
    argv = ["{io}", *options, "-f", "qcow2"]
    for command in commands:
        argv += ["-c", command]
    return [*argv, image]


def img(*words):
    return ["{img}", *words]


def alternate():
    """Discards low in the image between writes that need more space in a row than each gives back."""
    steps = []
    for turn in range(200):
        steps += [f"discard -q {turn * 128 * KIB} 64k", f"write -q -P 7 {512 * GIB + turn * MIB} 1m"]
    return steps


def flushed(turns, length):
    """Writes that allocate, each followed by a flush."""
    return [step for turn in range(turns) for step in (f"write -q {turn * length} {length}", "flush")]


SHRINK = ["{img}", "resize", "-q", "--shrink", "{dir}/a"]
CUT = ["truncate", "-s", "1M", "{dir}/a"]
COMMIT = ["{img}", "commit", "-q", "{dir}/a"]
# Reads what is not a hole: an image of 1 TiB has 160 MiB of that.
READ_METADATA = ["python3", "-c", """
import os, sys
fd, at = os.open(sys.argv[1], os.O_RDONLY), 0
try:
    while True:
        at = os.lseek(fd, at, os.SEEK_DATA)
        end = os.lseek(fd, at, os.SEEK_HOLE)
        while at < end:
            at += len(os.pread(fd, min(end - at, 1 << 20), at))
except OSError:
    pass
""", "{dir}/a"]
RANDOM_64G = scattered(64 * GIB, GIB)

ROWS = [
    Row("shrink/1T-metadata-to-64G", 0.005, ["a"], prepared(TIB), [*SHRINK, "64G"], same=sizes,
        gates={"barriers": 6}, slow=True),
    Row("shrink/64G-random-to-32G", 0.25, ["a"], RANDOM_64G, [*SHRINK, "32G"], gates={"barriers": 6}),
    # The pages are given back by one cut of the file, which one thread does: the limit, 0.19 of theirs.
    Row("shrink/64G-random-to-1M", 0.25, ["a"], RANDOM_64G, [*SHRINK, "1M"], gates={"barriers": 6},
        limit=CUT),
    Row("shrink/1T-empty-to-1G", 0.02, ["a"], empty(TIB), [*SHRINK, "1G"], gates={"barriers": 6}),

    Row("commit/1T-metadata-64M", 0.5, ["a", "base"],
        scattered(TIB, 64 * MIB, before=overlay(TIB, "-o", "preallocation=metadata,extended_l2=on")),
        COMMIT, same=bases, gates={"barriers": 8}, slow=True),
    # The snapshot keeps all the clusters.  256 MiB of tables are read to find what is allocated, and again to
    # count what stays; 32 MiB of counts and the 120 MiB of the base are written: the limit, 0.008 with two
    # cores.  The row is between 0.009 and 0.011.
    Row("commit/1T-metadata-64M-snapshot-bitmap", 0.01, ["a", "base"],
        then(scattered(TIB, 64 * MIB, before=overlay(TIB, "-o", "preallocation=metadata,extended_l2=on")),
             img("snapshot", "-c", "s", "{dir}/a"), img("bitmap", "--add", "{dir}/a", "b")),
        COMMIT, same=bases, gates={"barriers": 8}, slow=True,
        limit=READ_METADATA),
    # One thread at a time may write to a file; then the overlay's pages are freed: the limit.
    Row("commit/512M-random", 0.55, ["a", "base"], scattered(64 * GIB, 512 * MIB, before=overlay(64 * GIB)),
        COMMIT, same=bases, gates={"barriers": 8}, limit=["cp", "{dir}/a", "{dir}/b"]),
    Row("commit/512M-random-snapshot", 0.5, ["a", "base"],
        then(scattered(64 * GIB, 512 * MIB, before=overlay(64 * GIB)),
             img("snapshot", "-c", "s", "{dir}/a")),
        COMMIT, same=bases, gates={"barriers": 8}, limit=["cp", "{dir}/a", "{dir}/b"]),

    # What is freed lies here and there in the file, so that nearly each cluster is punched by itself; the
    # limit is to give the same pages back in one cut.
    Row("zero/64G-random", 0.25, ["a"], RANDOM_64G,
        io(*(f"write -q -z -u {n}G 1G" for n in range(64))), limit=CUT),
    Row("discard/64G-random", 0.25, ["a"], RANDOM_64G,
        io(*(f"discard -q {n}G 1G" for n in range(64))), limit=CUT),
    Row("zero/1T-empty", 0.05, ["a"], empty(TIB), io(*(f"write -q -z -u {n}G 1G" for n in range(1024))),
        same=sizes, gates={"bytes": 0}),

    Row("bitmap/4T-four-write-64K", 0.5, ["a"], bitmaps(4 * TIB), io("write -q 2M 64k"),
        same=sizes, gates={"barriers": 4, "bytes": "0.2"}),
    Row("bitmap/4T-four-open-close", None, ["a"], bitmaps(4 * TIB), io("read -q 0 4k"),
        same=sizes, gates={"bytes": 0}),
    Row("bitmap/merge", 0.5, ["a"], two_bitmaps, img("bitmap", "--merge", "b0", "{dir}/a", "b1"),
        same=sizes, gates={"barriers": 4}),

    Row("allocate/discard-low-write-high", 0.02, ["a"],
        then(prepared(512 * GIB), img("resize", "-q", "{dir}/a", "513G")), io(*alternate()),
        same=sizes, slow=True),
    Row("allocate/64K-depth-16", 0.75, ["a"], empty(8 * GIB),
        img("bench", "-w", "-f", "qcow2", "-t", "writeback", "-c", "16384", "-d", "16", "-s", "65536", "{dir}/a"),
        limit=["dd", "if=/dev/zero", "of={dir}/b", "bs=64k", "count=16384"]),
    Row("rebase/64G-512M", 0.05, ["a", "base", "other"],
        then(scattered(64 * GIB, 512 * MIB, before=overlay(64 * GIB)),
             img("create", "-q", "-f", "qcow2", "{dir}/other", "64G")),
        img("rebase", "-b", "other", "-F", "qcow2", "{dir}/a")),
    Row("check/1T-mapped", 0.3, ["a"], prepared(TIB), img("check", "-q", "{dir}/a"), same=sizes,
        limit=READ_METADATA),
    Row("map/1T-mapped", 0.3, ["a"], prepared(TIB), img("map", "--output=json", "{dir}/a"), same=printed,
        limit=READ_METADATA),
    Row("map/40000-fragments", 1, ["a"], fragments(40000), img("map", "--output=json", "{dir}/a"),
        same=printed),
    # The limit: tables read twice and written, counts read twice and written, by two threads; that is half of it.
    Row("snapshot/create-1T-mapped", 0.03, ["a"], prepared(TIB), img("snapshot", "-c", "s", "{dir}/a"),
        same=sizes, gates={"barriers": 5}, slow=True),
    Row("snapshot/delete-1T-mapped", 0.03, ["a"],
        then(prepared(TIB), img("snapshot", "-c", "s", "{dir}/a")),
        img("snapshot", "-d", "s", "{dir}/a"), same=sizes, slow=True),

    Row("barriers/16-flushes", None, ["a"], empty(GIB), io(*flushed(16, 64 * KIB)),
        gates={"barriers": 32}),
    Row("barriers/16-flushes-with-refcount-blocks", None, ["a"], of_clusters(16 * MIB, 512),
        io(*flushed(16, 128 * KIB)), gates={"barriers": 48}),
    # Nothing is there to be copied, so that the base has no barrier: all are those of emptying and
    # closing the overlay. No command empties and does nothing else.
    Row("barriers/empty", None, ["a", "base"],
        overlay(64 * GIB, "-o", "preallocation=metadata,extended_l2=on"), COMMIT, same=bases,
        gates={"barriers": 6}),
    Row("barriers/1600-writes-with-FUA-depth-16", None, ["a"], empty(GIB),
        img("bench", "-w", "-f", "qcow2", "-t", "writethrough", "-c", "1600", "-d", "16", "-s", "65536",
            "{dir}/a"), same=sizes, gates={"barriers": 220}),

    Row("bench/read-4K-depth-64", 0.55, ["a"],
        then(prepared(GIB, data=GIB)),
        img("bench", "-f", "qcow2", "-t", "writeback", "-c", "300000", "-d", "64", "-s", "4096", "{dir}/a"),
        same=sizes),
    Row("bench/write-4K-depth-64", 1, ["a"],
        then(prepared(GIB, data=GIB)),
        img("bench", "-w", "-f", "qcow2", "-t", "writeback", "-c", "100000", "-d", "64", "-s", "4096", "{dir}/a"),
        same=sizes),

    Row("convert/256M", 1, ["a"], prepared(256 * MIB, data=256 * MIB),
        img("convert", "-O", "qcow2", "{dir}/a", "{dir}/b"), same=converted,
        limit=["cp", "{dir}/a", "{dir}/c"]),
    Row("convert/256M-any-order", 1, ["a"], prepared(256 * MIB, data=256 * MIB),
        img("convert", "-W", "-O", "qcow2", "{dir}/a", "{dir}/b"), same=converted),
    Row("convert/256M-compressed", 1, ["a"], prepared(256 * MIB, data=256 * MIB),
        img("convert", "-c", "-O", "qcow2", "{dir}/a", "{dir}/b"), same=converted),
]
