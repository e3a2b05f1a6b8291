#include "replay/roofline.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <omp.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <functional>
#include <span>

#include "base/buffer.h"
#include "base/error.h"
#include "base/parallel.h"
#include "base/work.h"
#include "kernels/kernels.h"
#include "replay/engine.h"

namespace kvreplay {
namespace {

double seconds_of(const std::function<void()>& work) {
  const auto started = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
}

// The best of several tries: a ceiling is not what a disturbed moment allows.
double best_of(int tries, const std::function<void()>& work) {
  double best = seconds_of(work);
  for (int i = 1; i < tries; ++i) best = std::min(best, seconds_of(work));
  return best;
}

double median(std::vector<double> numbers) {
  const auto middle = numbers.begin() + static_cast<std::ptrdiff_t>(numbers.size() / 2);
  std::ranges::nth_element(numbers, middle);
  return *middle;
}

// Of the kernel and of Eigen, in turns.
void measure_products(Ceilings& ceilings) {
  constexpr Index kRows = 120;
  constexpr Index kDepth = 128;
  constexpr int kRepeats = 2000;
  constexpr int kTurns = 5;
  const int threads = omp_get_max_threads();
  const auto multiply = [](int) {
    Buffer left(kRows * kDepth);
    Buffer right(kDepth * kernels::kPanel);
    Buffer result(kRows * kernels::kPanel);
    std::fill_n(left.data(), left.size(), 1.0f);
    std::fill_n(right.data(), right.size(), 1.0f);
    for (int i = 0; i < kRepeats; ++i) {
      kernels::multiply(kRows, kernels::kPanel, kDepth, left.data(), kDepth, 1, right.data(), kernels::kPanel,
                        result.data(), kernels::kPanel);
    }
  };
  const auto multiply_by_eigen = [&](int) {
    const Matrix left = Matrix::Ones(kRows, kDepth);
    const Matrix right = Matrix::Ones(kDepth, kernels::kPanel);
    Matrix result(kRows, kernels::kPanel);
    for (int i = 0; i < kRepeats; ++i) result.noalias() = left * right;
  };
  const double operations = 2.0 * kRows * kDepth * kernels::kPanel * kRepeats * threads;
  for (int turn = 0; turn < kTurns; ++turn) {
    const auto rate = [&](const auto& work) { return operations / seconds_of([&] { parallel_for(threads, work); }); };
    ceilings.products_by_kernel = std::max(ceilings.products_by_kernel, rate(multiply));
    ceilings.products_by_eigen = std::max(ceilings.products_by_eigen, rate(multiply_by_eigen));
  }
  ceilings.products = std::max(ceilings.products_by_kernel, ceilings.products_by_eigen);
}

double exponential_rate() {
  constexpr Index kRows = 512;
  constexpr int kRepeats = 500;
  const int threads = omp_get_max_threads();
  const auto exponentiate = [&](int) {
    Buffer logits(kRows * kernels::kPanel);
    std::fill_n(logits.data(), logits.size(), 0.5f);
    for (int i = 0; i < kRepeats; ++i) {
      static_cast<void>(kernels::exponentiate({.logits = logits.data(),
                                               .panels = kRows,
                                               .panel_step = kernels::kPanel,
                                               .end_visible = kRows * kernels::kPanel},
                                              1.0f, 0));
    }
  };
  const double exponentials = static_cast<double>(kRows) * kernels::kPanel * kRepeats * threads;
  return exponentials / best_of(5, [&] { parallel_for(threads, exponentiate); });
}

double memory_rate() {
  constexpr Index kFloats = Index{64} << 20;
  const int threads = omp_get_max_threads();
  std::vector<Buffer> parts;
  for (int i = 0; i < threads; ++i) parts.emplace_back(kFloats / threads);
  std::vector<float> sums(static_cast<std::size_t>(threads));
  parallel_for(threads, [&](int i) {
    Buffer& part = parts[static_cast<std::size_t>(i)];
    std::fill_n(part.data(), part.size(), 1.0f);
  });
  const double seconds = best_of(5, [&] {
    parallel_for(threads, [&](int i) {
      const Buffer& part = parts[static_cast<std::size_t>(i)];
      sums[static_cast<std::size_t>(i)] = Eigen::Map<const Eigen::ArrayXf>(part.data(), part.size()).sum();
    });
  });
  for (Buffer& part : parts) part = Buffer();
  Buffer::give_back();
  const Index read = kFloats / threads * threads;
  return static_cast<double>(read) * sizeof(float) / seconds;
}

// Reads up to 1 GiB of the file by `threads` threads, block after block.
double file_rate(const std::filesystem::path& path, int threads) {
  constexpr std::int64_t kBlock = 1 << 20;
  constexpr std::int64_t kMost = std::int64_t{1} << 30;
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor < 0) throw Error(fmt::format("{}: cannot be read", path.string()));
  const std::int64_t size = std::min<std::int64_t>(::lseek(descriptor, 0, SEEK_END), kMost);
  const std::int64_t blocks = std::max<std::int64_t>(size / kBlock, 1);
  std::atomic<std::int64_t> bytes{0};
  const auto read_all = [&] {
    bytes = 0;
    std::atomic<std::int64_t> next{0};
    parallel_for(
        threads,
        [&](int) {
          std::vector<std::byte> memory(kBlock);
          for (std::int64_t block = next++; block < blocks; block = next++) {
            const ssize_t got = ::pread(descriptor, memory.data(), memory.size(), block * kBlock);
            if (got > 0) bytes += got;
          }
        },
        threads);
  };
  const double seconds = best_of(4, read_all);
  ::close(descriptor);
  return static_cast<double>(bytes) / seconds;
}

// Runs `work`, which takes all layers, and puts down what one of them took.
Stage measure_stage(std::string name, int settings, int layers, int runs, const std::function<void()>& work) {
  Stage stage{.name = std::move(name), .settings = settings};
  work();  // the first time, memory is asked for
  std::vector<double> seconds;
  const Work before = work_done();
  for (int run = 0; run < runs; ++run) seconds.push_back(seconds_of(work) / layers);
  const Work after = work_done();
  const double times = static_cast<double>(runs) * layers;
  stage.seconds = median(seconds);
  stage.bytes = (after.bytes - before.bytes) / times;
  stage.operations = (after.operations - before.operations) / times;
  stage.exponentials = (after.exponentials - before.exponentials) / times;
  return stage;
}

}  // namespace

Ceilings measure_ceilings(const TraceReader& trace) {
  Ceilings ceilings;
  measure_products(ceilings);
  ceilings.exponentials = exponential_rate();
  ceilings.memory = memory_rate();
  ceilings.file_by_one_thread = file_rate(trace.path(), 1);
  ceilings.file = std::max(file_rate(trace.path(), omp_get_max_threads()), ceilings.file_by_one_thread);
  return ceilings;
}

double Stage::floor(const Ceilings& ceilings) const {
  return bytes / ceilings.file + operations / ceilings.products + exponentials / ceilings.exponentials;
}

std::vector<Stage> measure_stages(const TraceReader& trace, int capacity, int runs) {
  const std::span<const TraceReader> traces(&trace, 1);
  const ModelInfo& model = trace.info().model;
  const std::string positions = fmt::format("{}", capacity);
  std::vector<Stage> stages;

  const auto select = [&](const std::string& name, const std::vector<std::string>& specs,
                          const std::vector<std::string>& capacities, Granularity granularity) {
    const ReplayEngine engine(traces, make_request(specs, capacities, granularity));
    stages.push_back(measure_stage(
        name, static_cast<int>(specs.size() * capacities.size()), model.num_layers, runs,
        [&] { engine.decide(engine.units(), [](const ReplayUnit&, const std::vector<LayerResidencies>&) {}); }));
  };

  const auto read = [&](int piece) {
    constexpr Index kRows = 512;
    const int heads = 2 * model.num_key_value_heads;
    const HeadTensor tensor = piece % 2 == 0 ? HeadTensor::keys : HeadTensor::values;
    Buffer rows(kRows * model.head_dim);
    for (Index first = 0; first < trace.info().num_tokens(); first += kRows) {
      const Index count = std::min<Index>(kRows, trace.info().num_tokens() - first);
      trace.read_rows(piece / heads, tensor, piece % heads / 2, first, count, rows.data());
    }
  };
  stages.push_back(measure_stage("reading keys and values", 0, model.num_layers, runs,
                                 [&] { parallel_for(model.num_layers * 2 * model.num_key_value_heads, read); }));
  select("snapkv", {"snapkv"}, {positions}, Granularity::query);
  select("restkv without projection", {"restkv(projection=false)"}, {positions}, Granularity::query);
  select("restkv", {"restkv"}, {positions}, Granularity::query);

  const std::vector<std::string> capacities = {"64", "128", "256", "512"};
  std::vector<std::string> in_time_and_space;
  std::vector<std::string> in_time;
  for (int alpha = 1; alpha <= 10; ++alpha) {
    for (int beta = 1; beta <= 10; ++beta) {
      in_time_and_space.push_back(fmt::format("restkv(alpha={},beta={})", 0.05 * alpha, 200 * beta));
    }
  }
  for (int i = 1; i <= 100; ++i) in_time.push_back(fmt::format("restkv(alpha={})", i / 101.0));
  select("restkv, 4 capacities", {"restkv"}, capacities, Granularity::kv);
  select("restkv, 10 alphas x 10 betas", in_time_and_space, capacities, Granularity::kv);
  select("restkv, 100 alphas", in_time, capacities, Granularity::kv);
  const ReplayEngine engine(traces, make_request({"recent"}, {positions}, Granularity::kv));
  stages.push_back(measure_stage("measuring one setting", 1, model.num_layers, runs, [&] {
    engine.run(engine.units(), [](const ReplayUnit&, const std::vector<LayerResult>&) {});
  }));
  return stages;
}

}  // namespace kvreplay
