#include "support/places.h"

namespace kvreplay::test {

std::filesystem::path project_folder() { return KVREPLAY_PROJECT_FOLDER; }
std::filesystem::path test_data() { return project_folder() / "tests" / "data"; }
std::filesystem::path golden_folder() { return project_folder() / "tests" / "golden"; }
std::filesystem::path bundled_traces() { return project_folder() / "traces"; }
std::filesystem::path kvreplay_executable() { return KVREPLAY_EXECUTABLE; }
std::filesystem::path test_plugins() { return KVREPLAY_TEST_PLUGINS; }

}  // namespace kvreplay::test
