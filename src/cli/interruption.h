// What a signal that ends the program leaves behind: nothing half-written.
#pragma once

namespace kvreplay::cli {

/// From here on, an interruption from the keyboard, a request to terminate and the loss of the terminal remove
/// unfinished output files before they end the process, as it would have ended without. Signals that are ignored (as by
/// nohup) stay so. To be called once, before any other thread is started.
void clean_up_when_interrupted();

}  // namespace kvreplay::cli
