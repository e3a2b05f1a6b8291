#!/usr/bin/env bash
# netCDF4 1.7.5 (Python; netCDF-C 4.10.1, HDF5 2.2.0 in its wheel), on HDF5 datasets of compound elements that hold a text.
#
# Good guess: HDF5 files are netCDF-4 files, so a dataset of (int32, 8 characters) is read, or refused with an error, and one
# of (int32, variable-length text) likewise. h5py reads both.
#
# What happens, on valid files that h5py 3.16.0 wrote:
#   - of a text with a fixed length of 8 the type has 1 character: {'start': '<i4', 'label': 'S1'}, 8 bytes instead of 12. The
#     buffer is made for 8 bytes a row and HDF5 writes 12 into it: rows after the first are shifted or garbage,
#       [(0, b'n'), (25964, b'\x01')]  where the file holds  [(0, 'needle'), (1, 'needle')]
#     and 20,000 rows end the process: SIGSEGV, with fewer "corrupted size vs. prev_size" and SIGABRT;
#   - of a text of variable length the whole dataset is left out: a UserWarning, "variable 'spans' has unsupported compound
#     datatype, skipping", and IndexError: spans not found in / for who asks for it.
# Store columns as datasets of their own: all readers take those.
#
# Needs Python 3.11 or newer with venv, and a network. Exits with 0 while this is so, with 1 once it no longer is.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/environment"
"$folder/environment/bin/pip" install --quiet --disable-pip-version-check \
  netCDF4==1.7.5 h5py==3.16.0 numpy==2.4.6
cd "$folder"

cat >write.py <<'EOF'
import sys
import h5py
import numpy as np

name, text, rows = sys.argv[1], sys.argv[2], int(sys.argv[3])
kind = np.dtype([("start", "<i4"), ("label", h5py.string_dtype() if text == "variable" else "S8")])
with h5py.File(name, "w") as file:
    file["spans"] = np.array([(row, "needle") for row in range(rows)], dtype=kind)
with h5py.File(name) as file:
    assert [(int(start), label) for start, label in file["spans"][:]] == [(row, b"needle") for row in range(rows)]
EOF

cat >read.py <<'EOF'
import sys
import netCDF4

spans = netCDF4.Dataset(sys.argv[1])["spans"]
print(spans.dtype.itemsize, [int(start) for start in spans[:]["start"]][:2], flush=True)
EOF

fail() {
  echo "changed: $*" >&2
  exit 1
}

python=environment/bin/python
"$python" write.py two.h5 fixed 2
"$python" write.py many.h5 fixed 20000
"$python" write.py variable.h5 variable 2

two=$("$python" read.py two.h5 2>&1) || true
echo "two rows, read as: $two"
[[ $two == "8 [0, "* ]] || fail 'a text of fixed length has another size in the type'
[[ $two != "8 [0, 1]" ]] || fail 'the rows are right'

status=0
{ "$python" read.py many.h5 >many.log 2>&1; } 2>/dev/null || status=$?
echo "20,000 rows: exit status $status"
[ "$status" -ge 128 ] || fail "20,000 rows no longer end the process: $(tail -n 1 many.log)"

status=0
"$python" read.py variable.h5 >variable.log 2>&1 || status=$?
echo "text of variable length: exit status $status, $(tail -n 1 variable.log)"
{ [ "$status" -eq 1 ] && grep -q 'unsupported compound datatype, skipping' variable.log; } ||
  fail 'a compound with a text of variable length is no longer left out'
