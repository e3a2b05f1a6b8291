// What a shell may offer at the end of a command line that is being typed.
#pragma once

#include <string>
#include <vector>

namespace CLI {
class App;
}

namespace kvreplay::cli {

/// Something that may stand there, and what it is, which may be empty.
struct Candidate {
  std::string text;
  std::string description;

  bool operator==(const Candidate&) const = default;
};

/// Stand among the candidates where names of files or of folders may stand too.
inline const std::string kFiles = ":files";
inline const std::string kFolders = ":folders";

/// What may stand for the last of `words`, which follow the program's name and are complete but for that one: commands,
/// options and their values, as far as `program` tells them. Words that cannot be are passed over.
std::vector<Candidate> candidates(const CLI::App& program, const std::vector<std::string>& words);

}  // namespace kvreplay::cli
