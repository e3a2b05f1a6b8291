// Passes matrices that own their memory in both directions: compiled for another processor than the library, it shows
// whether they agree on how such memory is aligned and freed.
#include "policy/plugin.h"

#ifndef METHOD_NAME
#define METHOD_NAME "matrices"
#endif

namespace kvreplay {
namespace {

class Matrices : public Ranking {
 public:
  // ‖W_h v_n‖, with the projection that the library allocated, grown here and freed here, and products of both kinds.
  void score(const Head& head, int member, std::span<float> scores) const override {
    Matrix projection = head.output_projection(member);
    const Index rows = projection.rows();
    projection.conservativeResize(rows + 3, Eigen::NoChange);
    projection.bottomRows(3).setZero();
    const Matrix projected = head.values() * projection.transpose();
    const Eigen::VectorXf first = projected * Eigen::VectorXf::Unit(projected.cols(), 0);
    for (std::size_t n = 0; n < scores.size(); ++n) {
      const auto row = static_cast<Index>(n);
      scores[n] = projected.row(row).norm() + 0 * first(row);
    }
  }
};

const MethodRegistration matrices([] {
  return Method{
      .name = METHOD_NAME,
      .summary = "Length of the projected value.",
      .source = "test",
      .parameters = {},
      .compose = [](const Arguments&) { return Composition{.rule = std::make_shared<Matrices>()}; },
  };
});

}  // namespace
}  // namespace kvreplay
