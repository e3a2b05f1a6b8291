#include "notebooks-export/tables/data_table.h"

#include <fmt/format.h>

#include <cmath>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <utility>

#include "base/printable.h"
#include "notebooks-export/tables/csv_field.h"

namespace kvreplay {

void DataTable::add(std::vector<Cell> row) {
  if (row.size() != columns_.size()) {
    throw std::logic_error(fmt::format("a row of {} cells for {} columns", row.size(), columns_.size()));
  }
  for (Cell& cell : row) {
    if (std::string* text = std::get_if<std::string>(&cell)) {
      *text = printable(*text);
    } else if (!std::isfinite(std::get<double>(cell))) {
      cell = std::nan("");
    }
  }
  rows_.push_back(std::move(row));
}

std::string DataTable::csv() const {
  std::string text;
  for (std::size_t i = 0; i < columns_.size(); ++i) text += (i == 0 ? "" : ",") + csv_field(columns_[i]);
  text += '\n';
  for (const std::vector<Cell>& row : rows_) {
    for (std::size_t i = 0; i < row.size(); ++i) {
      if (i > 0) text += ',';
      if (const std::string* field = std::get_if<std::string>(&row[i])) {
        text += csv_field(*field);
      } else if (const double number = std::get<double>(row[i]); !std::isnan(number)) {
        text += fmt::format("{}", number);
      }
    }
    text += '\n';
  }
  return text;
}

nlohmann::ordered_json DataTable::json() const {
  nlohmann::ordered_json rows = nlohmann::ordered_json::array();
  for (const std::vector<Cell>& row : rows_) {
    nlohmann::ordered_json object = nlohmann::ordered_json::object();
    for (std::size_t i = 0; i < row.size(); ++i) {
      if (const std::string* text = std::get_if<std::string>(&row[i])) {
        object[columns_[i]] = *text;
      } else if (const double number = std::get<double>(row[i]); std::isnan(number)) {
        object[columns_[i]] = nullptr;
      } else {
        object[columns_[i]] = number;
      }
    }
    rows.push_back(std::move(object));
  }
  return rows;
}

bool DataTable::is_text(std::size_t column) const {
  return !rows_.empty() && std::holds_alternative<std::string>(rows_.front()[column]);
}

}  // namespace kvreplay
