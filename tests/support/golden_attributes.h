// The arguments of a published implementation's call, as golden files hold them: attributes of a group.
#pragma once

#include <string>
#include <utility>

#include "hdf5/hdf5.h"

namespace kvreplay::test {

class GoldenAttributes {
 public:
  /// The file must outlive it.
  GoldenAttributes(const hdf5::File& file, std::string group) : file_(file), group_(std::move(group)) {}

  const hdf5::File& file() const { return file_; }
  const std::string& group() const { return group_; }

  bool has(const std::string& name) const { return file_.has_attribute(group_, name); }
  std::string text(const std::string& name) const { return file_.read_string(group_, name); }
  int number(const std::string& name) const { return static_cast<int>(file_.read_int(group_, name)); }
  double real(const std::string& name) const { return file_.read_double(group_, name); }
  bool flag(const std::string& name) const { return has(name) && file_.read_int(group_, name) != 0; }

 private:
  const hdf5::File& file_;
  std::string group_;
};

}  // namespace kvreplay::test
