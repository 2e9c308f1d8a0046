# What the tests of check share; after common.sh.
#
#     sound_image [OPTIONS]    makes good.qcow2: guest clusters 0..3 hold the bytes 1..4, the first
#                              one of the second L2 table holds 5; sets c, reftable, refblock, l1,
#                              l2 (the first), d0 .. d3 to places in the file
#     checks STATUS [OPTION...]    check of bad.qcow2 must exit with STATUS; output in $out
#     repairs LEAKS CORRUPTIONS OPTION...   check -r must repair so many and end with nothing left
#     guest_intact IMAGE [SKIP]    the guest clusters hold what they held; number SKIP aside
#     mentions TEXT, keeps_silent_on TEXT   the last run said so somewhere in a line, or did not
#     set_count OFFSET COUNT   of good.qcow2's cluster there, as arguments for damaged
#
# SPDX-License-Identifier: MIT

. "$test_source/bad-images.sh"

sound_image()
{
    "$QEMU_IMG" create -q -f qcow2 -o "cluster_size=64k${1:+,$1}" good.qcow2 1G
    ok io qcow2 good.qcow2 'write -q -P 1 0 64k' 'write -q -P 2 64k 64k' 'write -q -P 3 128k 64k' \
        'write -q -P 4 192k 64k' 'write -q -P 5 512M 64k'
    c=65536
    reftable=$(field reftable good.qcow2)
    refblock=$(entry good.qcow2 "$reftable")
    l1=$(field l1 good.qcow2)
    l2=$(entry good.qcow2 "$l1")
    d0=$(entry good.qcow2 "$l2") d1=$(entry good.qcow2 $((l2 + 8)))
    d2=$(entry good.qcow2 $((l2 + 16))) d3=$(entry good.qcow2 $((l2 + 24)))
}

# Refcounts of 16 bits.
set_count()
{
    printf '%d %04x' $((refblock + $1 / c * 2)) "$2"
}

# copied OFFSET: an entry that points there with the COPIED flag.
copied()
{
    printf %016x $(($1 | 1 << 63))
}

checks()
{
    checks_status=$1
    shift
    run "$QEMU_IMG" check -f qcow2 "$@" bad.qcow2
    [ "$rc" = "$checks_status" ] || fail "check $* exited with $rc, not $checks_status: $out"
}

repairs()
{
    repairs_leaks=$1 repairs_corruptions=$2
    shift 2
    checks 0 "$@"
    says "    $repairs_leaks leaked clusters"
    says "    $repairs_corruptions corruptions"
    says 'No errors were found on the image.'
    repairs_out=$out
    check_clean bad.qcow2
    out=$repairs_out
}

guest_intact()
{
    for guest in 0,1 65536,2 131072,3 196608,4 536870912,5; do
        [ "${guest#*,}" = "${2:-}" ] ||
            ok io qcow2 "$1" "read -q -P ${guest#*,} ${guest%,*} 64k"
    done
}

# mentions TEXT: it is somewhere in the output of the last run.
mentions()
{
    case $out in
    *"$1"*) ;;
    *) fail "expected '$1' in: $out" ;;
    esac
}

# keeps_silent_on TEXT: it is not.
keeps_silent_on()
{
    case $out in
    *"$1"*) fail "did not expect '$1' in: $out" ;;
    esac
}
