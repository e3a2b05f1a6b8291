#include "base/digest.h"

#include <fmt/format.h>
#include <xxhash.h>

namespace kvreplay {

struct Digest::State {
  std::unique_ptr<XXH64_state_t, decltype(&XXH64_freeState)> hash{XXH64_createState(), XXH64_freeState};
};

Digest::Digest() : state_(std::make_unique<State>()) { XXH64_reset(state_->hash.get(), 0); }
Digest::~Digest() = default;

void Digest::add(std::string_view text) {
  add_bytes(text.data(), text.size());
  add_bytes("\0", 1);
}

void Digest::add_bytes(const char* data, std::size_t size) { XXH64_update(state_->hash.get(), data, size); }

std::string Digest::text() const { return fmt::format("{:016x}", XXH64_digest(state_->hash.get())); }

}  // namespace kvreplay
