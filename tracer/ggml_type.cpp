#include "tracer/ggml_type.h"

namespace kvreplay::tracer {

std::optional<GgmlBlock> block_of(GgmlType type) {
  switch (type) {
    case GgmlType::F32:
      return GgmlBlock{"F32", 1, 4};
    case GgmlType::F16:
      return GgmlBlock{"F16", 1, 2};
    case GgmlType::Q4_0:
      return GgmlBlock{"Q4_0", 32, 18};
    case GgmlType::Q4_1:
      return GgmlBlock{"Q4_1", 32, 20};
    case GgmlType::Q5_0:
      return GgmlBlock{"Q5_0", 32, 22};
    case GgmlType::Q5_1:
      return GgmlBlock{"Q5_1", 32, 24};
    case GgmlType::Q8_0:
      return GgmlBlock{"Q8_0", 32, 34};
    case GgmlType::Q8_1:
      return GgmlBlock{"Q8_1", 32, 36};
    case GgmlType::Q2_K:
      return GgmlBlock{"Q2_K", 256, 84};
    case GgmlType::Q3_K:
      return GgmlBlock{"Q3_K", 256, 110};
    case GgmlType::Q4_K:
      return GgmlBlock{"Q4_K", 256, 144};
    case GgmlType::Q5_K:
      return GgmlBlock{"Q5_K", 256, 176};
    case GgmlType::Q6_K:
      return GgmlBlock{"Q6_K", 256, 210};
    case GgmlType::Q8_K:
      return GgmlBlock{"Q8_K", 256, 292};
    case GgmlType::IQ2_XXS:
      return GgmlBlock{"IQ2_XXS", 256, 66};
    case GgmlType::IQ2_XS:
      return GgmlBlock{"IQ2_XS", 256, 74};
    case GgmlType::IQ3_XXS:
      return GgmlBlock{"IQ3_XXS", 256, 98};
    case GgmlType::IQ1_S:
      return GgmlBlock{"IQ1_S", 256, 50};
    case GgmlType::IQ4_NL:
      return GgmlBlock{"IQ4_NL", 32, 18};
    case GgmlType::IQ3_S:
      return GgmlBlock{"IQ3_S", 256, 110};
    case GgmlType::IQ2_S:
      return GgmlBlock{"IQ2_S", 256, 82};
    case GgmlType::IQ4_XS:
      return GgmlBlock{"IQ4_XS", 256, 136};
    case GgmlType::I8:
      return GgmlBlock{"I8", 1, 1};
    case GgmlType::I16:
      return GgmlBlock{"I16", 1, 2};
    case GgmlType::I32:
      return GgmlBlock{"I32", 1, 4};
    case GgmlType::I64:
      return GgmlBlock{"I64", 1, 8};
    case GgmlType::F64:
      return GgmlBlock{"F64", 1, 8};
    case GgmlType::IQ1_M:
      return GgmlBlock{"IQ1_M", 256, 56};
    case GgmlType::BF16:
      return GgmlBlock{"BF16", 1, 2};
    case GgmlType::TQ1_0:
      return GgmlBlock{"TQ1_0", 256, 54};
    case GgmlType::TQ2_0:
      return GgmlBlock{"TQ2_0", 256, 66};
    case GgmlType::MXFP4:
      return GgmlBlock{"MXFP4", 32, 17};
    case GgmlType::NVFP4:
      return GgmlBlock{"NVFP4", 64, 36};
    case GgmlType::Q1_0:
      return GgmlBlock{"Q1_0", 128, 18};
  }
  return std::nullopt;
}

}  // namespace kvreplay::tracer
