// Where the program under test and the tests' files are. Known to places.cpp alone, so that builds in different folders
// share the other compiled files through ccache.
#pragma once

#include <filesystem>

namespace kvreplay::test {

/// The checkout.
std::filesystem::path project_folder();
/// tests/data.
std::filesystem::path test_data();
/// tests/golden.
std::filesystem::path golden_folder();
/// The bundled model and prompts: traces.
std::filesystem::path bundled_traces();
/// kvreplay itself; only tests that depend on its target find it.
std::filesystem::path kvreplay_executable();
/// The built plug-ins; only tests that depend on them find them.
std::filesystem::path test_plugins();

}  // namespace kvreplay::test
