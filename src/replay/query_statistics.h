// What the queries of a model are like, over several traces.
#pragma once

#include <filesystem>
#include <span>

#include "trace/reader.h"

namespace kvreplay {

/// Writes mean and covariance of every query head's prompt queries with their rotation taken off, over all queries of
/// all traces but the first `sinks` of each: per layer `/layers/<l>/mean` [H, D], `/layers/<l>/covariance` [H, D, D]
/// and
/// `/layers/<l>/magnitude` [H, F], the mean of frequency_magnitudes(), in float32, divided by the count, which is the
/// attribute `queries` (docs/results-format.md). Sums are in double and in the order of the traces. Throws Error where
/// the traces are not of one model, by name or shape, where one does not say
/// how positions turned its queries, or where none has a query that counts. The file is complete or absent.
void write_query_statistics(const std::filesystem::path& path, std::span<const TraceReader> traces, int sinks);

}  // namespace kvreplay
