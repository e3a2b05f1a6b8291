// The page of a report: one HTML file that needs nothing else.
#pragma once

#include <string>
#include <vector>

#include "analysis/analysis.h"
#include "notebooks-export/figure.h"

namespace kvreplay {

/// A figure as the page shows it: drawn for a window, and for a narrow one, of the same table.
struct PageFigure {
  Figure figure;                  ///< of Theme::screen
  nlohmann::ordered_json narrow;  ///< the spec of Theme::paper
};

/// What the page says beside the figures.
struct PageContent {
  std::string title = {};
  std::vector<std::string> findings = {};  ///< sentences, the most important first
  std::vector<std::string> left_out = {};  ///< figures that there are no data for, and what they need
  std::string missing = {};                ///< why no figure is drawn; empty where they are
  std::string javascript = {};             ///< that draws Vega-Lite; empty where it is missing
};

/// index.html. `style` is that of the figures on it, whose files lie beside the page in figures/ and tables/. What
/// comes from files of others stands there as text, whatever it contains.
std::string page_text(const Analysis& analysis, const FigureStyle& style, const std::vector<PageFigure>& figures,
                      const PageContent& content);

/// How index.html begins, by which a report is known.
extern const char* const kReportMarker;

}  // namespace kvreplay
