#include "trace/layer_fields.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <map>

namespace kvreplay {
namespace {

class AsText {
 public:
  template <class Number>
  void number(const char* name, const Number& value, Bound) {
    fields_.push_back({name, fmt::format("{}", value)});
  }
  void text(const char* name, const std::string& value) { fields_.push_back({name, value}); }
  void list(const char* name, const std::vector<float>& values, Index) {
    fields_.push_back({name, fmt::format("{}", fmt::join(values, ",")), true});
  }
  void norm(const char* name, const RmsNorm& norm, Index) {
    std::string value;
    if (!norm.weight.empty()) value = fmt::format("{};{}", norm.epsilon, fmt::join(norm.weight, ","));
    fields_.push_back({name, std::move(value), true});
  }

  const std::vector<LayerField>& fields() const { return fields_; }

 private:
  std::vector<LayerField> fields_;
};

std::vector<LayerField> fields_of(const LayerInfo& layer, const TraceInfo& info) {
  AsText text;
  visit_layer_fields(layer, info, text);
  return text.fields();
}

}  // namespace

std::vector<LayerField> fields_of_its_own(const TraceInfo& info, int layer) {
  const std::vector<LayerField> model = fields_of(info.model.layer(), info);
  const std::vector<LayerField> own = fields_of(info.layer(layer), info);
  std::vector<LayerField> different;
  for (std::size_t i = 0; i < own.size(); ++i) {
    if (own[i].value != model[i].value) different.push_back(own[i]);
  }
  return different;
}

}  // namespace kvreplay
