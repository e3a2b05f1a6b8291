// What kvreplay and its plug-ins agree on, and how they are loaded. Plug-ins include policy/plugin.h.
#pragma once

#include <cstddef>
#include <filesystem>
#include <initializer_list>
#include <string>
#include <vector>

#include "policy/policy.h"

namespace kvreplay {

/// The version of what kvreplay and its plug-ins share, which is all that policy.h, parameter.h and head.h declare.
/// Raised by every change after which plug-ins have to be compiled anew; a new virtual function is one.
inline constexpr int kPolicyInterfaceVersion = 8;

/// How a compilation lays out the types that kvreplay and its plug-ins exchange. Differs, whatever the version, where
/// another Eigen or another mode of the standard library was compiled with.
struct BinaryLayout {
  int eigen = EIGEN_WORLD_VERSION * 10000 + EIGEN_MAJOR_VERSION * 100 + EIGEN_MINOR_VERSION;
  int matrix_alignment = EIGEN_DEFAULT_ALIGN_BYTES;  ///< bytes
  std::size_t type_sizes = digest(
      {sizeof(std::string), sizeof(std::vector<int>), sizeof(Matrix), sizeof(CachePositions), sizeof(HeadShape),
       sizeof(Head), sizeof(WindowCombination), sizeof(CombinedAttention), sizeof(SpecPart), sizeof(Parameter),
       sizeof(Arguments), sizeof(Need), sizeof(Requirements), sizeof(BudgetRequest), sizeof(Policy), sizeof(Method)});

  bool operator==(const BinaryLayout&) const = default;

 private:
  static constexpr std::size_t digest(std::initializer_list<std::size_t> sizes) {
    std::size_t digest = 0;
    for (const std::size_t size : sizes) digest = digest * 1009 + size;
    return digest;
  }
};

/// What a plug-in exports, as data, so that nothing of it runs before kvreplay has compared version and layout. The
/// order of these members never changes.
struct PolicyPlugin {
  int interface_version = kPolicyInterfaceVersion;
  BinaryLayout layout = {};
  std::vector<Method> (*methods)() = nullptr;
};

/// Adds the methods of the plug-in in this file; one that is loaded already is left as it is. Throws Error, naming the
/// file, where it is not there, not a shared library, not a plug-in, compiled for another version of the interface or
/// with another layout, or where it adds no methods, or one that register_methods refuses. Not while other threads look
/// methods up.
void load_plugin(const std::filesystem::path& path);

}  // namespace kvreplay
