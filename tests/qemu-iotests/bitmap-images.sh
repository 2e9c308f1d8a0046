# What the tests of bitmaps share, on top of common.sh.
#
#     bitmaps_are IMAGE LINE...     the bitmaps stored in IMAGE, each as bitmap_dump.py prints it
#     poke IMAGE OFFSET BYTES...    writes bytes, as printf takes them
#     directory_of IMAGE            offset of the bitmap directory
#
# SPDX-License-Identifier: MIT

command -v python3 >/dev/null || skip "no python3"

bitmaps_are()
{
    python3 "$test_source/bitmap_dump.py" "$1" >bitmaps.seen || fail "the bitmaps of $1 cannot be read"
    shift
    for line; do
        printf '%s\n' "$line"
    done >bitmaps.wanted
    [ $# -gt 0 ] || : >bitmaps.wanted
    diff -u bitmaps.wanted bitmaps.seen >&2 || fail "these are not the bitmaps"
}

poke()
{
    printf "$3" | dd of="$1" bs=1 seek="$2" conv=notrunc status=none
}

directory_of()
{
    python3 - "$1" "$test_source" <<'PY'
import struct, sys
sys.path.insert(0, sys.argv[2])
from bitmap_dump import EXT_BITMAPS, Image
print(struct.unpack(">IIQQ", Image(sys.argv[1]).extension(EXT_BITMAPS))[3])
PY
}
