// A report: one page, the figures, the tables behind them, and a notebook.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "analysis/analysis.h"
#include "notebooks-export/figure.h"

namespace kvreplay {

struct ReportOptions {
  std::string title = {};              ///< empty: by what was captured
  FigureOptions figures = {};          ///< of the figures' files; the page follows the reader's light or dark
  std::vector<std::string> only = {};  ///< names of figures; empty: all
  std::filesystem::path python = {};   ///< of the environment that draws; empty: where it is looked for
  bool force = false;                  ///< replaces what stands at the output
};

/// What was written.
struct ReportOutcome {
  std::vector<std::string> findings;  ///< what the page begins with
  std::vector<std::string> figures;   ///< names of those drawn up
  std::vector<std::string> left_out;  ///< "name: what it needs", for what could not be
  std::string thinned;                ///< which policies figures show, and by which rule, where they do not show all
  std::string missing;                ///< one line where pictures could not be drawn; else empty
};

/// Throws what write_report throws of the place and of the figures' names, before there is an analysis; and Error where
/// a Python was named that cannot draw.
void check_report(const std::filesystem::path& folder, const ReportOptions& options);

/// Writes index.html, figures/<name>.{vl.json,svg,png,pdf}, tables/<name>.csv and notebook.ipynb into `folder`: under a
/// temporary name, then renamed. Throws Error where it exists and is not to be replaced, or is no report; UsageError
/// for an unknown figure, naming those there are.
ReportOutcome write_report(const std::filesystem::path& folder, const Analysis& analysis, const ReportOptions& options);

/// The notebook (nbformat 4.5) that shows the figures and draws them again from the tables with pandas and Altair.
/// `thinned`: which policies no figure shows, and why; empty where all are shown. `pictures`: PNG files of the figures
/// as base64, in the same order; empty where there are none.
std::string notebook_text(const std::string& title, const std::string& thinned, const std::vector<Figure>& figures,
                          const std::vector<std::string>& pictures);

}  // namespace kvreplay
