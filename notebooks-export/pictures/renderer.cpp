#include "notebooks-export/pictures/renderer.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <spawn.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <nlohmann/json.hpp>
#include <string_view>
#include <utility>

#include "base/error.h"
#include "base/file_text.h"
#include "base/output_file.h"
#include "base/printable.h"
#include "notebooks-export/embedded_files.h"

namespace kvreplay {
namespace {

using nlohmann::ordered_json;

// A Python that runs render.py, spoken to through a socket. It reads and writes no files, and ends when the socket
// does, however this process ends.
class Drawer {
 public:
  explicit Drawer(const std::filesystem::path& python) {
    std::array<int, 2> ends{};
    if (::socketpair(AF_UNIX, SOCK_STREAM, 0, ends.data()) != 0) throw failure(python, errno);
    socket_ = ends[0];
    for (const int end : ends) ::fcntl(end, F_SETFD, FD_CLOEXEC);
    messages_ = std::tmpfile();
    if (messages_ == nullptr) throw failure(python, errno);

    posix_spawn_file_actions_t actions;
    ::posix_spawn_file_actions_init(&actions);
    ::posix_spawn_file_actions_adddup2(&actions, ends[1], STDIN_FILENO);
    ::posix_spawn_file_actions_adddup2(&actions, ends[1], STDOUT_FILENO);
    ::posix_spawn_file_actions_adddup2(&actions, ::fileno(messages_), STDERR_FILENO);
    // Signals that one thread of this process waits for are blocked in all others, and would be in the child.
    posix_spawnattr_t attributes;
    ::posix_spawnattr_init(&attributes);
    sigset_t none;
    ::sigemptyset(&none);
    ::posix_spawnattr_setsigmask(&attributes, &none);
    ::posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGMASK);

    std::string program = python.string();
    std::string option = "-c";
    std::string script(embedded_file("render.py"));
    std::array<char*, 4> arguments{program.data(), option.data(), script.data(), nullptr};
    const int reason = ::posix_spawn(&process_, program.c_str(), &actions, &attributes, arguments.data(), environ);
    ::posix_spawn_file_actions_destroy(&actions);
    ::posix_spawnattr_destroy(&attributes);
    ::close(ends[1]);
    if (reason != 0) {
      process_ = 0;
      close_all();
      throw failure(python, reason);
    }
  }
  ~Drawer() { close_all(); }
  Drawer(const Drawer&) = delete;
  Drawer& operator=(const Drawer&) = delete;

  // The parts of an answer by their names, which are these. Throws Error with what the script, or Python itself, says.
  std::map<std::string, std::string> ask(const ordered_json& request, const std::vector<std::string>& names) {
    send(request.dump(-1, ' ', true, ordered_json::error_handler_t::replace) + "\n");
    while (buffer_.find('\n') == std::string::npos) receive();
    const std::string line = buffer_.substr(0, buffer_.find('\n'));
    buffer_.erase(0, line.size() + 1);
    const ordered_json head = ordered_json::parse(line, nullptr, false);
    if (!head.is_object() || (head.contains("error") && !head["error"].is_string())) {
      throw Error(fmt::format("an answer that is none: {}", printable(line.substr(0, 80))));
    }
    if (head.contains("error")) throw Error(printable(head["error"].get<std::string>()));
    std::map<std::string, std::string> parts;
    for (const auto& [name, size] : head.items()) {
      if (!size.is_number_unsigned())
        throw Error(fmt::format("an answer that is none: {}", printable(line.substr(0, 80))));
      const auto bytes = size.get<std::size_t>();
      while (buffer_.size() < bytes) receive();
      parts[name] = buffer_.substr(0, bytes);
      buffer_.erase(0, bytes);
    }
    for (const std::string& name : names) {
      if (!parts.contains(name)) throw Error(fmt::format("an answer without {}", name));
    }
    return parts;
  }

 private:
  static Error failure(const std::filesystem::path& python, int reason) {
    return Error(fmt::format("{}: cannot be run: {}", python.string(), std::strerror(reason)));
  }

  void send(std::string_view text) {
    while (!text.empty()) {
      const ssize_t count = ::send(socket_, text.data(), text.size(), MSG_NOSIGNAL);
      if (count < 0 && errno == EINTR) continue;
      if (count <= 0) throw ended();
      text.remove_prefix(static_cast<std::size_t>(count));
    }
  }

  void receive() {
    std::array<char, 1 << 16> bytes;
    ssize_t count = 0;
    do {
      count = ::recv(socket_, bytes.data(), bytes.size(), 0);
    } while (count < 0 && errno == EINTR);
    if (count <= 0) throw ended();
    buffer_.append(bytes.data(), static_cast<std::size_t>(count));
  }

  // The last line of what Python wrote before it ended: the kind of an exception and its message.
  Error ended() {
    std::string text;
    if (std::fseek(messages_, 0, SEEK_SET) != 0) return Error("Python ended unexpectedly");
    std::array<char, 4096> bytes;
    for (std::size_t count = 0; (count = std::fread(bytes.data(), 1, bytes.size(), messages_)) > 0;) {
      text.append(bytes.data(), count);
    }
    text.erase(text.find_last_not_of(" \n") + 1);
    const std::string last = text.substr(text.rfind('\n') + 1);  // npos + 1 is 0
    return Error(last.empty() ? "Python ended unexpectedly" : printable(last));
  }

  void close_all() {
    if (socket_ >= 0) ::close(socket_);
    socket_ = -1;
    if (process_ > 0) {
      while (::waitpid(process_, nullptr, 0) < 0 && errno == EINTR) {
      }
    }
    process_ = 0;
    if (messages_ != nullptr) std::fclose(messages_);
    messages_ = nullptr;
  }

  int socket_ = -1;
  pid_t process_ = 0;
  std::FILE* messages_ = nullptr;  // a nameless file: a pipe that nobody reads would fill
  std::string buffer_;
};

std::filesystem::path default_python() {
  const char* data = std::getenv("XDG_DATA_HOME");
  const char* home = std::getenv("HOME");
  std::filesystem::path folder;
  if (data != nullptr && *data != '\0') {
    folder = data;
  } else if (home != nullptr && *home != '\0') {
    folder = std::filesystem::path(home) / ".local" / "share";
  } else {
    return {};
  }
  return folder / "kvreplay" / "report-environment" / "bin" / "python";
}

}  // namespace

std::optional<Renderer> Renderer::find(const std::filesystem::path& python, std::string& missing) {
  Renderer renderer;
  const char* chosen = std::getenv("KVREPLAY_REPORT_PYTHON");
  if (!python.empty()) {
    renderer.python_ = python;
  } else if (chosen != nullptr && *chosen != '\0') {
    renderer.python_ = chosen;
  } else {
    renderer.python_ = default_python();
  }
  missing.clear();
  try {
    if (renderer.python_.empty()) throw Error("neither HOME nor XDG_DATA_HOME is set");
    Drawer(renderer.python_).ask({{"version", true}}, {"version"});
    return renderer;
  } catch (const Error& error) {
    missing = fmt::format(
        "figures are not drawn, since there is no Python with vl-convert ({}): 'make report-environment' in kvreplay's "
        "source folder makes one; or 'python3 -m venv DIR', 'DIR/bin/pip install vl-convert-python==1.9.0.post1' and "
        "--python DIR/bin/python",
        error.what());
    return std::nullopt;
  }
}

void Renderer::draw(const std::filesystem::path& folder, const std::vector<std::string>& names) const {
  Drawer drawer(python_);
  for (const std::string& name : names) {
    const std::filesystem::path figure = folder / "figures" / name;
    try {
      ordered_json spec = ordered_json::parse(file_text(figure.string() + ".vl.json"));
      // What an editor reads beside the file goes along with the request.
      ordered_json& data = spec["data"];
      data["values"] = file_text(folder / "figures" / data["url"].get<std::string>());
      data.erase("url");
      const ordered_json ppi = spec["usermeta"]["kvreplay"]["ppi"];
      for (const auto& [kind, bytes] : drawer.ask({{"spec", std::move(spec)}, {"ppi", ppi}}, {"svg", "png", "pdf"})) {
        OutputFile::write_text(figure.string() + "." + kind, bytes);
      }
    } catch (const Error& error) {
      throw Error(fmt::format("figure {}: cannot be drawn: {}", name, error.what()));
    } catch (const ordered_json::exception& error) {
      throw Error(fmt::format("figure {}: its spec cannot be read: {}", name, error.what()));
    }
  }
}

std::string Renderer::javascript() const {
  try {
    return Drawer(python_).ask({{"javascript", true}}, {"javascript"}).at("javascript");
  } catch (const Error& error) {
    throw Error(fmt::format("the page's JavaScript cannot be made: {}", error.what()));
  }
}

}  // namespace kvreplay
