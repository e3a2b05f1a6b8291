#include "policy/plugin_interface.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <fmt/format.h>

#include <cstdlib>
#include <memory>
#include <set>
#include <string_view>

#include "base/error.h"
#include "base/printable.h"

namespace kvreplay {
namespace {

std::string demangled(const std::string& symbol) {
  int status = 0;
  const std::unique_ptr<char, decltype(&std::free)> name(abi::__cxa_demangle(symbol.c_str(), nullptr, nullptr, &status),
                                                         &std::free);
  return name ? name.get() : symbol;
}

// What the dynamic linker has to say, without the file's name, which every error begins with.
std::string loading_failure(const std::filesystem::path& file) {
  const char* message = ::dlerror();
  std::string text = message == nullptr ? "unknown reason" : message;
  const std::string prefix = file.string() + ": ";
  if (text.starts_with(prefix)) text.erase(0, prefix.size());
  constexpr std::string_view undefined = "undefined symbol: ";
  if (text.starts_with(undefined)) {
    const std::string symbol = demangled(text.substr(undefined.size()));
    if (symbol.find("kvreplay::") != std::string::npos) {
      return fmt::format("this kvreplay has no {}, which it needs; compile it against this kvreplay", symbol);
    }
    return fmt::format("nothing that it is linked with has {}", symbol);
  }
  return fmt::format("cannot be loaded as a shared library: {}", text);
}

}  // namespace

void load_plugin(const std::filesystem::path& path) {
  static std::set<void*> loaded;
  const auto failure = [name = printable(path.string())](std::string_view reason) {
    return Error(fmt::format("{}: {}", name, printable(reason)));
  };
  std::error_code ignored;
  if (!std::filesystem::exists(path, ignored)) throw failure("no such plug-in");
  // Absolute, since the dynamic linker looks for bare names elsewhere than in the current folder.
  const std::filesystem::path file = std::filesystem::absolute(path);
  if (std::filesystem::is_directory(file, ignored)) throw failure("is a folder, not a plug-in");

  // Never closed, not even after a failure: what its initialisation has left behind may point into it.
  void* const library = ::dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw failure(loading_failure(file));
  if (loaded.contains(library)) return;
  const auto* const plugin = static_cast<const PolicyPlugin*>(::dlsym(library, "kvreplay_policy_plugin"));
  if (plugin == nullptr) {
    throw failure("is a shared library but no plug-in for kvreplay; one includes policy/plugin.h");
  }
  if (plugin->interface_version != kPolicyInterfaceVersion) {
    throw failure(
        fmt::format("was compiled for version {} of the policy interface, and this kvreplay has version {}; compile it "
                    "against this "
                    "kvreplay",
                    plugin->interface_version, kPolicyInterfaceVersion));
  }
  if (plugin->layout != BinaryLayout{}) {
    throw failure(
        fmt::format("was compiled with other types than this kvreplay (Eigen {} aligned to {} bytes, type sizes {:x}; "
                    "here Eigen {}, "
                    "{} bytes, {:x}); compile it with find_package(kvreplay) and the same Eigen and standard library",
                    plugin->layout.eigen, plugin->layout.matrix_alignment, plugin->layout.type_sizes,
                    BinaryLayout{}.eigen, BinaryLayout{}.matrix_alignment, BinaryLayout{}.type_sizes));
  }
  try {
    std::vector<Method> methods = plugin->methods();
    if (methods.empty()) throw Error("adds no methods");
    register_methods(std::move(methods));
  } catch (const std::exception& error) {
    throw failure(error.what());
  }
  loaded.insert(library);
}

}  // namespace kvreplay
