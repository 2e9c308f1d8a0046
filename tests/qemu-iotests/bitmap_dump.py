#!/usr/bin/env python3
"""Reads persistent bitmaps straight from a qcow2 file, by the format's description alone.

    bitmap_dump.py IMAGE [NAME]    a line for each bitmap: NAME FLAGS GRANULARITY RANGES
                                   FLAGS: auto, in-use, or -; RANGES: byte ranges start+length, or -

SPDX-License-Identifier: MIT
"""
import struct
import sys

EXT_BITMAPS = 0x23852875


class Image:
    def __init__(self, path):
        with open(path, "rb") as f:
            self.data = f.read()
        (self.version, self.backing, _, cluster_bits, self.size) = \
            struct.unpack_from(">IQIIQ", self.data, 4)
        self.cluster = 1 << cluster_bits
        self.autoclear, _, self.header_length = struct.unpack_from(">QII", self.data, 88)

    def extension(self, kind):
        pos, end = self.header_length, self.backing or self.cluster
        while pos + 8 <= end:
            found, length = struct.unpack_from(">II", self.data, pos)
            if found == kind:
                return self.data[pos + 8:pos + 8 + length]
            if not found:
                break
            pos += 8 + (length + 7) // 8 * 8
        return None

    def bitmaps(self):
        """Yields (name, flags, granularity, set of dirty granules)."""
        ext = self.extension(EXT_BITMAPS)
        if not ext or self.version < 3 or not self.autoclear & 1:
            return
        count, _, size, pos = struct.unpack(">IIQQ", ext)
        end = pos + size
        for _ in range(count):
            table, entries, flags, kind, bits, name_length, extra = \
                struct.unpack_from(">QIIBBHI", self.data, pos)
            name = self.data[pos + 24 + extra:pos + 24 + extra + name_length].decode()
            assert kind == 1
            yield name, flags, 1 << bits, self.dirty(table, entries, 1 << bits, flags)
            pos += (24 + extra + name_length + 7) // 8 * 8
        assert pos == end, "directory size"

    def dirty(self, table, entries, granularity, flags):
        count = -(-self.size // granularity)
        raw = b""
        for entry in struct.unpack_from(f">{entries}Q", self.data, table):
            assert not entry & 0xff000000000001fe
            if entry & 0xfffffffffffe00:
                chunk = self.data[entry:entry + self.cluster]
                raw += chunk + bytes(self.cluster - len(chunk))
            else:
                raw += (b"\xff" if entry & 1 else b"\0") * self.cluster
        if not flags & 1:
            assert entries == max(-(-(-(-count // 8)) // self.cluster), 1), "size of the table"
        return {i for i in range(min(count, len(raw) * 8)) if raw[i // 8] >> i % 8 & 1}


def ranges(dirty, granularity, size):
    """Sorted, merged (start, length) in bytes."""
    found = []
    for i in sorted(dirty):
        start, end = i * granularity, min((i + 1) * granularity, size)
        if found and found[-1][1] == start:
            found[-1][1] = end
        else:
            found.append([start, end])
    return [(start, end - start) for start, end in found]


def main():
    image = Image(sys.argv[1])
    for name, flags, granularity, dirty in image.bitmaps():
        if len(sys.argv) > 2 and name != sys.argv[2]:
            continue
        words = ["in-use"] * (flags & 1) + ["auto"] * (flags >> 1 & 1)
        text = ",".join(f"{a}+{n}" for a, n in ranges(dirty, granularity, image.size))
        print(name, ",".join(words) or "-", granularity, text or "-")


if __name__ == "__main__":
    main()
