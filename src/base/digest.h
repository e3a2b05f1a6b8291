// What a text or several values come to, as 16 hexadecimal digits.
#pragma once

#include <memory>
#include <string>
#include <string_view>

namespace kvreplay {

/// An XXH64 digest (seed 0) over values that are added one after the other.
class Digest {
 public:
  Digest();
  ~Digest();
  Digest(const Digest&) = delete;
  Digest& operator=(const Digest&) = delete;

  /// A value, with its end marked: "ab" and "c" differ from "a" and "bc".
  void add(std::string_view text);

  /// Bytes of a value that comes in pieces.
  void add_bytes(const char* data, std::size_t size);

  std::string text() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace kvreplay
