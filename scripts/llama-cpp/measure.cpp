// Prefill and decode rates of llama.cpp through its own interface, for compare.sh:
//   measure MODEL.gguf PROMPT_TOKENS GENERATED_TOKENS THREADS
// Flash attention and 16-bit keys and values, llama.cpp's defaults where it has them. Prints tokens per second of both.
#include <llama.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace {

double seconds_of(const auto& work) {
  const auto started = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5) {
    std::fprintf(stderr, "usage: %s MODEL.gguf PROMPT_TOKENS GENERATED_TOKENS THREADS\n", argv[0]);
    return 2;
  }
  const int prompt = std::atoi(argv[2]);
  const int generated = std::atoi(argv[3]);
  llama_log_set([](ggml_log_level, const char*, void*) {}, nullptr);
  llama_backend_init();
  llama_model* model = llama_model_load_from_file(argv[1], llama_model_default_params());
  if (model == nullptr) {
    std::fprintf(stderr, "%s: cannot be loaded\n", argv[1]);
    return 1;
  }
  llama_context_params params = llama_context_default_params();
  params.n_ctx = static_cast<std::uint32_t>(prompt + generated + 8);
  params.n_batch = static_cast<std::uint32_t>(prompt);
  params.n_threads = params.n_threads_batch = std::atoi(argv[4]);
  params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
  llama_context* context = llama_init_from_model(model, params);
  if (context == nullptr) return 1;
  const auto decode = [&](llama_token* tokens, int count) {
    if (llama_decode(context, llama_batch_get_one(tokens, count)) != 0) std::exit(1);
    llama_synchronize(context);
  };
  std::vector<llama_token> tokens;
  for (int i = 0; i < prompt; ++i) tokens.push_back(3 + i * 7919 % 4000);
  decode(tokens.data(), 1);  // brings the weights into memory
  llama_memory_clear(llama_get_memory(context), true);
  const double prefill = seconds_of([&]() { decode(tokens.data(), prompt); });
  const double decoding = seconds_of([&]() {
    for (int i = 0; i < generated; ++i) decode(&tokens[static_cast<std::size_t>(i)], 1);
  });
  std::printf("prefill %.1f decode %.2f\n", prompt / prefill, generated / decoding);
}
