// What an HDF5 file is, for whoever named it in the place of another.
#pragma once

#include <string>

#include "hdf5/hdf5.h"

namespace kvreplay {

/// "a file of results, as --output writes it, ...", by the file's attribute `format`. Throws Error as reading it does.
std::string kind_of(const hdf5::File& file);

}  // namespace kvreplay
