#!/usr/bin/env bash
# h5py 3.16.0 (HDF5 2.0.0) writing with libver="latest", h5py 3.8.0 (HDF5 1.12.2) reading.
#
# Good guess: libver="latest" gives the newest *file* format, whose superblock has been version 3 since HDF5 1.10, so a file in
# which nothing new is used (floats, gzip, a compound of an integer and a float) opens in HDF5 1.12; if not, opening it fails.
#
# What happens: the file opens, its attributes and plain datasets are read, and
#   - every dataset with a filter is a KeyError: 'Unable to open object (bad version number for layout message)';
#   - every compound dataset is a KeyError: 'Unable to open object (bad version number for datatype message)'.
# So a reader that looks at what is there finds most of it and not the rest. libver=("v114", "v114") and older bounds write
# files that HDF5 1.12 reads whole (("v110", "v110") is for HDF5 1.10), with the same checksums over metadata.
#
# Needs Python 3.11 (h5py 3.8.0 has wheels for 3.7 to 3.11) with venv, and a network. Exits with 0 while this is so, with 1
# once it no longer is.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for environment in new old; do python3 -m venv "$folder/$environment"; done
"$folder/new/bin/pip" install --quiet --disable-pip-version-check h5py==3.16.0 numpy==2.4.6
"$folder/old/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: h5py==3.8.0 numpy==1.26.4
cd "$folder"

cat >write.py <<'EOF'
import h5py
import numpy as np

for name, bounds in (("latest.h5", "latest"), ("v114.h5", ("v114", "v114")), ("v110.h5", ("v110", "v110"))):
    with h5py.File(name, "w", libver=bounds) as file:
        file["plain"] = np.arange(600, dtype="<f4")
        file.create_dataset("gzip", data=np.arange(600, dtype="<f4"), chunks=(100,), compression="gzip")
        file["compound"] = np.array([(1, 2.0)], dtype=[("a", "<i4"), ("b", "<f8")])
        file.attrs["text"] = "hello"
print("written by HDF5", h5py.version.hdf5_version)
EOF

cat >read.py <<'EOF'
import h5py

print("read by HDF5", h5py.version.hdf5_version)
for name in ("latest.h5", "v114.h5", "v110.h5"):
    with h5py.File(name) as file:
        assert file.attrs["text"] == "hello"
        for dataset in ("plain", "gzip", "compound"):
            try:
                file[dataset][:]
                print(name, dataset, "read")
            except KeyError as error:
                print(name, dataset, error.args[0])
EOF

new/bin/python write.py
old/bin/python read.py | tee read.log

cat >expected.log <<'EOF'
read by HDF5 1.12.2
latest.h5 plain read
latest.h5 gzip Unable to open object (bad version number for layout message)
latest.h5 compound Unable to open object (bad version number for datatype message)
v114.h5 plain read
v114.h5 gzip read
v114.h5 compound read
v110.h5 plain read
v110.h5 gzip read
v110.h5 compound read
EOF
if ! diff expected.log read.log; then
  echo "changed: HDF5 1.12.2 reads other parts of what HDF5 2.0 writes" >&2
  exit 1
fi
