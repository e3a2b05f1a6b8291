// Draws specs as SVG, PNG and PDF with vl-convert, which lives in a Python virtual environment of its own.
#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

namespace kvreplay {

/// The environment that scripts/make-report-environment.sh makes. Nothing but this knows of Python.
class Renderer {
 public:
  /// Looks for it: `python` where that is not empty, else KVREPLAY_REPORT_PYTHON, else the script's default place.
  /// Nothing where there is none; `missing` then says in one line what and how to get it.
  static std::optional<Renderer> find(const std::filesystem::path& python, std::string& missing);

  /// Draws `folder`/figures/<name>.vl.json, whose data are the tables beside it, as <name>.svg, .png and .pdf.
  /// Throws Error naming the figure.
  void draw(const std::filesystem::path& folder, const std::vector<std::string>& names) const;

  /// JavaScript that draws Vega-Lite in a page without the network.
  std::string javascript() const;

 private:
  std::filesystem::path python_;
};

}  // namespace kvreplay
