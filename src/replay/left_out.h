// Settings that a note is about, and those that a replay leaves out because they cannot be replayed.
#pragma once

#include <cstddef>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "policy/need.h"

namespace kvreplay {

/// Names settings in a note: "snapkv at 16, 32; h2o at 16 and 3 more policies".
class SettingNames {
 public:
  /// Settings of one policy follow each other. `capacity` is as it was asked for; empty: whatever was.
  void add(const std::string& policy, const std::string& capacity);

  int count() const { return count_; }
  std::string text() const;

 private:
  std::vector<std::pair<std::string, std::string>> policies_;  // with their capacities
  int count_ = 0;
};

/// What was asked of one trace and eviction and is left out, put together by why.
class LeftOut {
 public:
  /// As SettingNames::add.
  void add(const std::string& policy, const std::string& capacity, const Obstacle& obstacle);

  /// Of the first of them, as whoever asked for it alone has to be told: "reason; cure". Empty where there is none.
  const std::string& first() const { return first_; }

  /// A note for each reason.
  std::vector<std::string> notes() const;

 private:
  struct Group {
    Obstacle obstacle;
    SettingNames settings;
  };
  std::string first_;
  std::vector<Group> groups_;
  std::map<std::string, std::size_t> place_;  // of a reason among the groups
};

}  // namespace kvreplay
