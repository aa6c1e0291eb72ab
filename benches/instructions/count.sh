#!/usr/bin/env bash
# Counts the instructions of the engine's operations on one core, and compares them with those of counts.txt, so that a
# slowdown shows on a machine whose clock cannot be trusted.
#
#     benches/instructions/count.sh            fails where a count is more than 2 % above or below the recorded one
#     benches/instructions/count.sh --write    records the counts
#
# Needs valgrind, and a machine of x86-64: valgrind shows every such machine the same instructions, up to AVX2. The counts
# belong to a version of the compiler; with another one, differences are printed and are no failure.
set -euo pipefail
cd "$(dirname "$0")"

counts=counts.txt
compiler=$(rustc --version)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

program=$(cargo test --release --workspace --test instructions --no-run 2>&1 |
    sed -n 's/^ *Executable .*(\(.*\))$/\1/p')
[[ -x "$program" ]] || { echo "error: the program was not built: cargo test --release --workspace --test instructions" >&2; exit 2; }

# Instructions of the whole program that runs an operation so many times.
total() {
    RAYON_NUM_THREADS=1 valgrind --tool=callgrind --callgrind-out-file=/dev/null "$program" "$1" "$2" \
        2>&1 >/dev/null | sed -n 's/.*Collected : \([0-9]*\)$/\1/p'
}

# The first run of an operation also allocates and starts threads, so those after it are counted.
"$program" | while read -r operation _; do
    echo "$operation $((($(total "$operation" 5) - $(total "$operation" 1)) / 4))"
done >"$scratch/counts"

if [[ "${1:-}" == --write ]]; then
    { echo "# $compiler"; cat "$scratch/counts"; } >"$counts"
    exit
fi

awk -v compiler="# $compiler" '
    FNR == NR && /^#/ { same = $0 == compiler; next }
    FNR == NR { before[$1] = $2; next }
    {
        ratio = before[$1] > 0 ? $2 / before[$1] : 0
        differs = ratio < 0.98 || ratio > 1.02
        failed += differs
        printf "%-20s %12d %12d  %.3f%s\n", $1, before[$1], $2, ratio, differs ? "  differs" : ""
    }
    END {
        if (failed && !same) print "The counts were recorded with another compiler, so this is no failure."
        if (failed && same) print "Record the counts with --write where the change is meant."
        exit failed && same
    }
' "$counts" "$scratch/counts"
