// docs/policies.md and the program list the same methods, with the same parameters and defaults.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>

#include "policy/policy.h"

namespace kvreplay {
namespace {

TEST(PoliciesPage, ListsTheMethodsThatThereAre) {
  std::ifstream page(KVREPLAY_TRACES_DIR "/../docs/policies.md");
  ASSERT_TRUE(page);
  std::vector<std::string> listed;
  for (std::string line; std::getline(page, line);) {
    if (line.starts_with("| `")) listed.push_back(line.substr(3, line.find('`', 3) - 3));
  }
  std::vector<std::string> registered;
  for (const Method* method : registered_methods()) {
    if (method->variant_of.empty()) registered.push_back(signature(*method));
  }
  EXPECT_THAT(listed, testing::ElementsAreArray(registered));
}

}  // namespace
}  // namespace kvreplay
