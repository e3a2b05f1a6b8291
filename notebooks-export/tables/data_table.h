// A table as it stands behind a figure: named columns of text or numbers.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <variant>
#include <vector>

namespace kvreplay {

/// Text, or a number; NaN where there is none.
using Cell = std::variant<std::string, double>;

/// Tidy: a row per observation. Rows have a cell for every column, of the same kind in all rows.
class DataTable {
 public:
  explicit DataTable(std::vector<std::string> columns) : columns_(std::move(columns)) {}

  /// Text is made printable, since names and tokens come from files; a number that is not finite is none.
  void add(std::vector<Cell> row);

  const std::vector<std::string>& columns() const { return columns_; }
  const std::vector<std::vector<Cell>>& rows() const { return rows_; }
  bool empty() const { return rows_.empty(); }

  /// Whether a column holds text. False for all of them in an empty table.
  bool is_text(std::size_t column) const;

  /// RFC 4180, with a head; numbers in the shortest form that reads back the same, none as an empty field.
  std::string csv() const;

  /// Rows as objects for Vega-Lite; no number is null.
  nlohmann::ordered_json json() const;

 private:
  std::vector<std::string> columns_;
  std::vector<std::vector<Cell>> rows_;
};

}  // namespace kvreplay
