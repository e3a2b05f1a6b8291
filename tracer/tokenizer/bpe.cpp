#include "tracer/tokenizer/bpe.h"

#include <fmt/format.h>

#include <queue>

#include "base/error.h"
#include "base/printable.h"
#include "tracer/tokenizer/aligned_text.h"

namespace kvreplay::tracer {

namespace {

// A token of the word so far, in a list that shrinks as neighbours are joined.
struct Symbol {
  std::int32_t id;
  std::int32_t previous;
  std::int32_t next;   // -1: none
  std::size_t length;  // 0: joined to what stands before it
};

// Two neighbours that can be joined.
struct Candidate {
  std::uint32_t rank;
  std::int32_t left;
  std::int32_t id;

  // The best one is the largest.
  bool operator<(const Candidate& other) const { return rank != other.rank ? rank > other.rank : left > other.left; }
};

}  // namespace

Bpe::Bpe(Vocabulary vocabulary, const std::vector<std::pair<std::string, std::string>>& merges, Options options)
    : vocabulary_(std::move(vocabulary)), options_(std::move(options)) {
  tokens_.reserve(vocabulary_.size());
  for (const auto& [token, id] : vocabulary_) {
    const auto [other, is_new] = tokens_.try_emplace(id, &token);
    if (!is_new) {
      throw Error(fmt::format("the tokens \"{}\" and \"{}\" have the same id {}",
                              printable(std::min(token, *other->second)), printable(std::max(token, *other->second)),
                              id));
    }
  }
  merges_.reserve(merges.size());
  for (std::size_t rank = 0; rank < merges.size(); ++rank) {
    const auto& [left, right] = merges[rank];
    const auto left_id = id_of(left);
    const auto right_id = id_of(right);
    const auto id = id_of(left + right);
    if (!left_id || !right_id || !id) {
      throw Error(fmt::format("merge {}, of \"{}\" and \"{}\": not all of them are in the vocabulary", rank + 1,
                              printable(left), printable(right)));
    }
    merges_.insert_or_assign(pair_of(*left_id, *right_id), Merge{static_cast<std::uint32_t>(rank), *id});
  }
  for (std::size_t byte = 0; byte < 256; ++byte) byte_tokens_[byte] = id_of(fmt::format("<0x{:02X}>", byte));
  if (options_.unknown_token) unknown_ = id_of(*options_.unknown_token);
}

void Bpe::encode(std::string_view word, std::vector<Token>& tokens) const {
  tokens.clear();
  if (word.empty()) return;
  if (options_.ignore_merges) {
    if (const auto id = id_of(word)) {
      tokens.push_back({*id, word.size()});
      return;
    }
  }
  spell(word, tokens);
  if (tokens.size() < 2) return;

  std::vector<Symbol> symbols(tokens.size());
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    const auto at = static_cast<std::int32_t>(i);
    symbols[i] = {tokens[i].id, at - 1, i + 1 < tokens.size() ? at + 1 : -1, tokens[i].length};
  }
  std::vector<Candidate> found;
  found.reserve(tokens.size());
  for (std::size_t i = 0; i + 1 < symbols.size(); ++i) {
    if (const Merge* merge = merge_of(symbols[i].id, symbols[i + 1].id)) {
      found.push_back({merge->rank, static_cast<std::int32_t>(i), merge->id});
    }
  }
  std::priority_queue<Candidate> candidates({}, std::move(found));
  const auto symbol = [&](std::int32_t at) -> Symbol& { return symbols[static_cast<std::size_t>(at)]; };
  while (!candidates.empty()) {
    const Candidate best = candidates.top();
    candidates.pop();
    Symbol& left = symbol(best.left);
    if (left.length == 0 || left.next < 0) continue;
    Symbol& right = symbol(left.next);
    // One of the two may have been joined to something else since.
    const Merge* merge = merge_of(left.id, right.id);
    if (merge == nullptr || merge->id != best.id) continue;
    left.id = best.id;
    left.length += right.length;
    left.next = right.next;
    right.length = 0;
    if (left.next >= 0) symbol(left.next).previous = best.left;
    if (left.previous >= 0) {
      if (const Merge* before = merge_of(symbol(left.previous).id, left.id)) {
        candidates.push({before->rank, left.previous, before->id});
      }
    }
    if (left.next >= 0) {
      if (const Merge* after = merge_of(left.id, symbol(left.next).id)) {
        candidates.push({after->rank, best.left, after->id});
      }
    }
  }
  tokens.clear();
  for (const Symbol& each : symbols) {
    if (each.length > 0) tokens.push_back({each.id, each.length});
  }
}

std::optional<std::int32_t> Bpe::id_of(std::string_view token) const {
  const auto found = vocabulary_.find(token);
  return found == vocabulary_.end() ? std::nullopt : std::optional(found->second);
}

const std::string* Bpe::token(std::int32_t id) const {
  const auto found = tokens_.find(id);
  return found == tokens_.end() ? nullptr : found->second;
}

// The tokens of a word's characters, before any is joined.
void Bpe::spell(std::string_view word, std::vector<Token>& tokens) const {
  std::optional<Token> unknown;  // held back until a character with a token follows, also behind bytes that follow it
  for (std::size_t at = 0; at < word.size();) {
    const std::string_view character = word.substr(at, leading_character(word.substr(at)));
    at += character.size();
    if (const auto id = id_of(character)) {
      if (unknown) tokens.push_back(*unknown);
      unknown.reset();
      tokens.push_back({*id, character.size()});
      continue;
    }
    if (options_.byte_fallback && spell_in_bytes(character, tokens)) continue;
    if (!options_.unknown_token) continue;
    if (!unknown_) {
      throw Error(fmt::format("\"{}\" has no token, and the unknown token \"{}\" is not in the vocabulary",
                              printable(character), printable(*options_.unknown_token)));
    }
    if (unknown && options_.fuse_unknown) {
      unknown->length += character.size();
      continue;
    }
    if (unknown) tokens.push_back(*unknown);
    unknown = Token{*unknown_, character.size()};
  }
  if (unknown) tokens.push_back(*unknown);
}

bool Bpe::spell_in_bytes(std::string_view character, std::vector<Token>& tokens) const {
  for (const char byte : character) {
    if (!byte_tokens_[static_cast<unsigned char>(byte)]) return false;
  }
  for (const char byte : character) tokens.push_back({*byte_tokens_[static_cast<unsigned char>(byte)], 1});
  return true;
}

const Bpe::Merge* Bpe::merge_of(std::int32_t left, std::int32_t right) const {
  const auto found = merges_.find(pair_of(left, right));
  return found == merges_.end() ? nullptr : &found->second;
}

}  // namespace kvreplay::tracer
