// The processes that share a sweep: one, or those that mpirun started.
#pragma once

#include <string>

namespace kvreplay {

/// The processes that work together, numbered from 0. All of them must call barrier(), from_first() and first_failure()
/// in the same order.
class Ranks {
 public:
  Ranks() = default;
  virtual ~Ranks() = default;
  Ranks(const Ranks&) = delete;
  Ranks& operator=(const Ranks&) = delete;

  virtual int rank() const = 0;
  virtual int size() const = 0;
  /// How many of them run on this node.
  virtual int size_on_node() const = 0;

  bool is_first() const { return rank() == 0; }

  /// Waits for all.
  virtual void barrier() = 0;

  /// The text of rank 0, for all.
  virtual std::string from_first(const std::string& text) = 0;

  /// Of all messages the one of the lowest rank that has one; empty where none has.
  virtual std::string first_failure(const std::string& message) = 0;

  /// Tells the others, without waiting for them, that this process stops working.
  virtual void announce_stop() = 0;

  /// Whether another one did.
  virtual bool others_stopped() = 0;
};

/// One process that works alone.
class SingleProcess final : public Ranks {
 public:
  int rank() const override { return 0; }
  int size() const override { return 1; }
  int size_on_node() const override { return 1; }
  void barrier() override {}
  std::string from_first(const std::string& text) override { return text; }
  std::string first_failure(const std::string& message) override { return message; }
  void announce_stop() override {}
  bool others_stopped() override { return false; }
};

/// The number that MPI's launcher gave to this process, and how many it started; 0 of 1 without one. To be asked before
/// MPI itself is.
struct LaunchedRank {
  int rank = 0;
  int size = 1;
};
LaunchedRank launched_rank();

}  // namespace kvreplay
