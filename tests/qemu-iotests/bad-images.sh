# What the tests of damaged images share; after common.sh.
#
#     poke FILE OFFSET HEX     writes bytes          peek FILE OFFSET LENGTH   prints bytes in hex
#     no_open TEXT [OFFSET HEX]...   a copy of good.qcow2 with these bytes is opened by no command;
#                              each says "Could not open ...: TEXT" and the copy stays as it is
#     damaged [OFFSET HEX]...  makes bad.qcow2, a copy of good.qcow2 with these bytes
#     untouched CMD...         must end in good order (status 0 to 3) and leave bad.qcow2 as it was
#     field NAME IMAGE         a field of the header, decimal
#
# SPDX-License-Identifier: MIT

# printf knows octal only.
poke()
{
    poke_bytes=
    for byte in $(printf %s "$3" | sed 's/../& /g'); do
        poke_bytes="$poke_bytes\\$(printf %03o "0x$byte")"
    done
    # shellcheck disable=SC2059
    printf "$poke_bytes" | dd of="$1" bs=1 seek="$(($2))" conv=notrunc status=none
}

peek()
{
    od -An -v -tx1 -j "$(($2))" -N "$3" "$1" | tr -d ' \n'
}

# hex64 NUMBER: as 8 bytes for poke.
hex64()
{
    printf %016x "$1"
}

field()
{
    case $1 in
    l1) at=40 n=8 ;;
    reftable) at=48 n=8 ;;
    snapshots) at=64 n=8 ;;
    incompatible) at=72 n=8 ;;
    *) fail "no field '$1'" ;;
    esac
    printf %d "0x$(peek "$2" "$at" "$n")"
}

# entry IMAGE OFFSET: the place that a table entry there points to, decimal.
entry()
{
    # without the byte of flags, as numbers of the shell have a sign
    echo $((0x$(peek "$1" "$(($2 + 1))" 7) & 0x00fffffffffffe00))
}

damaged()
{
    cp good.qcow2 bad.qcow2
    while [ $# -gt 0 ]; do
        poke bad.qcow2 "$1" "$2"
        shift 2
    done
}

untouched()
{
    cp bad.qcow2 before.qcow2
    run timeout 60 "$@"
    [ "$rc" -le 3 ] || fail "'$*' exited with $rc: $out"
    cmp bad.qcow2 before.qcow2 || fail "'$*' changed the image"
}

no_open()
{
    no_open_text=$1
    shift
    damaged "$@"
    untouched "$QEMU_IMG" info -f qcow2 bad.qcow2
    is 1 "$rc" "exit status of info with $*"
    says "qemu-img: Could not open 'bad.qcow2': $no_open_text"
    untouched "$QEMU_IMG" convert -f qcow2 -O raw bad.qcow2 out.raw
    is 1 "$rc" "exit status of convert with $*"
    says "qemu-img: Could not open 'bad.qcow2': $no_open_text"
    untouched "$QEMU_IO" -f qcow2 -c 'write 0 64k' bad.qcow2
    is 1 "$rc" "exit status of qemu-io with $*"
    says "qemu-io: can't open device bad.qcow2: Could not open 'bad.qcow2': $no_open_text"
}
