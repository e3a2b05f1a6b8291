// The commands of kvreplay, one file each. A command adds itself to the application and runs when it is chosen; what
// goes wrong it throws as Error or UsageError.
#pragma once

namespace CLI {
class App;
}

namespace kvreplay::cli {

void add_capture_command(CLI::App& app);
void add_synth_command(CLI::App& app);
void add_inspect_command(CLI::App& app);
void add_replay_command(CLI::App& app);
void add_live_command(CLI::App& app);
void add_sweep_command(CLI::App& app);
void add_analyze_command(CLI::App& app);
void add_report_command(CLI::App& app);
void add_policies_command(CLI::App& app);
void add_variants_command(CLI::App& app);
void add_bench_command(CLI::App& app);
void add_query_statistics_command(CLI::App& app);

/// What makes a shell complete command lines, and what it asks then.
void add_completion_commands(CLI::App& app);
void add_manual_command(CLI::App& app);

}  // namespace kvreplay::cli
